"""Sphinx's configuration of the site: `make docs`."""

project = "d2ext"
author = "the d2ext authors"
copyright = author

extensions = ["myst_parser"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # of text blocks that are no code
exclude_patterns: list[str] = []

html_theme = "furo"
html_title = "d2ext"
html_show_sourcelink = False
html_static_path: list[str] = []


def _links_to_the_root(content) -> None:
    """Pages of the site stand for files at the repository's root."""
    for file in ("CONTRIBUTING", "CHANGELOG"):
        for link in (f"]({file}.md)", f"](../{file}.md)"):
            content[0] = content[0].replace(link, f"]({file.lower()}.md)")
    content[0] = content[0].replace("](LICENSE)", "](../LICENSE)")


def setup(app) -> None:
    app.connect("source-read", lambda app, page, content: _links_to_the_root(content))
    app.connect("include-read", lambda app, file, page, content: _links_to_the_root(content))
