"""HTML pages: one file each, without scripts or external files, light or dark as the reader's system is."""

import html
from collections.abc import Mapping


def page(title: str, body: str, style: str = "") -> str:
    """A whole page of this body, under its title; `style` is added to that of all pages."""
    title = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


def definitions(rows: Mapping[str, str]) -> str:
    """Names and their values in two columns."""
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items()) + "</dl>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --card: #fff; --page: #f6f8fa;
  --accent: #3b6fb6; --warm: #d1495b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --card: #161b22; --page: #0d1117;
    --accent: #79b0f2; --warm: #f0808d; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 1500px; padding: 2rem 1.5rem; }
h1 { margin: 0 0 1.2rem; } h2 { margin: 0 0 .6rem; } h3 { margin: 0; color: var(--accent); }
section { margin-top: 2.5rem; }
.row { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 1rem; }
@media (max-width: 800px) { .row { grid-template-columns: 1fr; } }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; }
.card h2 { color: var(--accent); font-size: 1.2rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; }
img { width: 100%; margin-top: 1rem; border-radius: 6px; }
.small { color: var(--soft); font-size: .875rem; margin: .7rem 0 .25rem; } .small b { color: var(--ink); }
.problem { color: var(--warm); } .prompt { color: var(--soft); }
pre { font: .875rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: .7rem .9rem; background: var(--page); border-radius: 6px; min-height: 2.5rem;
  max-height: 26rem; overflow: auto; }
footer { color: var(--soft); font-size: .875rem; margin-top: 2.5rem; }
"""
