"""The site of `make docs`, by Sphinx: the pages of the repository under their own names, so that their links hold in both."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import reference
from pygments.lexers.special import TextLexer

NAV = {
    "Guide": ["quickstart", "django", "browser", "publishing", "history", "security"],
    "Running it": ["deployment", "proxies", "upgrade", "scaling", "failover", "operations"],
    "Reference": [f"reference/{name}" for name in reference.PAGES],
    "Project": ["architecture", "fanout", "/SECURITY", "/CONTRIBUTING", "/CHANGELOG"],
}

project = "sse-relay-server"
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md"]
exclude_patterns = [".*", "build", "dist", "site"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
smartquotes_action = "D"  # quotes stay as they are written: many are code
autodoc_typehints = "description"
default_role = "literal"  # single backticks in docstrings
html_theme = "furo"
html_title = project
html_extra_path = ["index.html"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False


def setup(app: Sphinx) -> None:
    """Let the pages be completed as they are read."""
    app.add_lexer("haproxy", TextLexer)  # Pygments knows none
    app.connect("source-read", complete)


def complete(_: Sphinx, page: str, source: list[str]) -> None:
    """Add the navigation to the first page, and to a page of the reference what the code says."""
    if page == root_doc:
        for caption, pages in NAV.items():
            names = [name if name.startswith("/") else f"/docs/{name}" for name in pages]
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", *names, "```\n"])
    elif page.startswith("docs/reference/"):
        source[0] += "\n" + "\n".join(reference.PAGES[Path(page).name]()) + "\n"
