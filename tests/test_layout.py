"""The layout that makes the core readable: imports have no circle and no room imports from a wing above it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
WINGS = ("hub", "inference", "planning", "serving")  # each may import from those before it
COMMANDS = {"compare", "evaluate", "export", "plan", "sample", "serve", "train", "verify"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*(ROOT / "gptjax").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
}


def imports_of(name):
    """The modules that a module imports, with the packages around them that are not around itself."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptjax"):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {each if each in FILES else node.module for each in full}
    around = {".".join(parts[:n]) for parts in (each.split(".") for each in found) for n in range(2, len(parts))}
    return (found | {each for each in around if not name.startswith(f"{each}.")}) - {name}


def level(name):
    """0 for the core, data and reporting, then the wings in order, then the commands."""
    room = name.split(".")[1] if name.startswith("gptjax.") and not name.endswith(".__main__") else "commands"
    return WINGS.index(room) + 1 if room in WINGS else len(WINGS) + 1 if room in {*COMMANDS, "commands"} else 0


def test_no_room_imports_from_a_wing_above_it():
    upward = [(name, other) for name in FILES for other in imports_of(name) if level(other) > level(name)]
    assert upward == []


def test_imports_have_no_circle():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in sorted(imports_of(name)):
                visit(other)
            done.add(open_.pop())

    for name in FILES:
        visit(name)


def test_each_public_function_and_class_has_a_docstring():
    """The reference of the site shows no others. What a Section's `validate` does, its base class says."""
    missing = [
        f"{name}.{inner.name}"
        for name, path in FILES.items()
        for outer in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(outer, (ast.Module, ast.ClassDef)) and not getattr(outer, "name", "").startswith("_")
        for inner in outer.body
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not (inner.name.startswith("_") or inner.name == "validate" or ast.get_docstring(inner))
    ]
    assert missing == []
