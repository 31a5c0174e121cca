"""What the site adds to docs/: the README as its start, files that pages link to, and the reference from docstrings."""

import ast
import json
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r'(\]\(|src=")(?![a-z]+:|#)([^)"#\s]+)')
LANGUAGES = {"Dockerfile": "dockerfile", ".py": "python", ".sh": "bash", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    pages = {"index.md": LINK.sub(r"\1../\2", (ROOT / "README.md").read_text("utf-8"))} | dict(_reference())
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    texts = pages | {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked = {_target(name, link) for name, text in texts.items() for _, link in LINK.findall(text)}
    linked |= {f"{path}/{name}" for path in linked if (ROOT / path).is_dir() for name in _files(ROOT / path)}
    for path in sorted(linked):
        if not path.startswith("docs/") and (ROOT / path).exists():
            added = {"content": _shown(ROOT / path), "inclusion": InclusionLevel.NOT_IN_NAV}
            files.append(File.generated(config, f"source/{path}.md", **added))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the pages that show these files; GitHub follows them to the files themselves."""

    def lead(link: re.Match[str]) -> str:
        path = _target(page.file.src_uri, link[2])
        page_of = path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"
        if link[1] != "](":
            return link[1] + page_of  # an <img> of the README, which is at the top of the site
        return link[1] + posixpath.relpath(page_of, posixpath.dirname(page.file.src_uri) or ".")

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(lead, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep an option of a command in one line: browsers break lines after hyphens."""

    def unbroken(code: re.Match[str]) -> str:
        return re.sub(r"--[\w.]+", r'<span class="option">\g<0></span>', code[0])

    return re.sub(r"<code>[^<]*</code>", unbroken, html)


def _target(page: str, link: str) -> str:
    """The path that a link of a page in docs/ leads to, from the top of the checkout."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def _reference() -> dict[str, str]:
    """A page for each module of gptjax/, and one for the modules of each package."""
    pages = dict[str, str]()
    for path in sorted((ROOT / "gptjax").rglob("*.py")):
        *packages, name = path.relative_to(ROOT).with_suffix("").parts
        if not name.startswith("__") and name != "stablehlo_example":
            page = f"reference/{'.'.join(packages[1:]) or name}.md"
            module = f"\n::: {'.'.join([*packages, name])}\n"
            if packages[1:]:
                pages[page] = pages.get(page, f"# {'.'.join(packages)}\n") + module
            else:
                pages[page] = f"{module}    options: {{heading_level: 1}}\n"
    return pages


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _shown(path: Path) -> str:
    """A page that shows a file, a notebook's cells, or the names in a folder."""
    if path.is_dir():
        text = "".join(f"- [{name}]({path.name}/{name}.md)\n" for name in _files(path))
    elif path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text("utf-8"))["cells"]]
        text = "\n\n".join(f"```python\n{lines}\n```" if kind == "code" else lines for kind, lines in cells)
        text = re.sub(r"^# .*\n", "", text)  # the page has its own title
    else:
        text = f"````{LANGUAGES.get(path.suffix or path.name, 'text')}\n{path.read_text('utf-8')}\n````\n"
    return f"---\nsearch: {{exclude: true}}\n---\n# {path.relative_to(ROOT)}\n\n{text}"


class Docstrings(griffe.Extension):
    """Gives fields the descriptions that are not in docstrings, and fits docstrings to Markdown."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: object) -> None:
        """Describe a config's field by its `--help` text and show its default; another's by the comment in its line."""
        if not isinstance(node, ast.AnnAssign) or not attr.parent or not attr.parent.is_class or attr.docstring:
            return
        help = node.value.args[-1] if isinstance(node.value, ast.Call) and node.value.args else None
        comment = re.search(r"  # (.*)$", attr.lines[-1]) if attr.lines else None
        if isinstance(help, ast.Constant) and isinstance(help.value, str):
            default, *_ = node.value.args
            attr.value = "..." if default is help else ast.unparse(default)
            attr.docstring = griffe.Docstring(help.value, parent=attr)
        elif comment:
            attr.docstring = griffe.Docstring(comment[1], parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Begin a list, and an indented block, with the empty line without which Markdown sees a paragraph."""
        if obj.docstring:
            text = re.sub(r"(?m)^(?! *- )(?!Raises:)(\S.*)\n(?=    \S|- )", r"\1\n\n", obj.docstring.value)
            obj.docstring.value = text
