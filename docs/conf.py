"""Sphinx configuration."""

import re

import atoll

project = "atoll"
author = "the atoll authors"
release = atoll.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "atoll"
# Lines of a hundred characters fit beside the contents.
html_theme_options = {"light_css_variables": {"code-font-size": "72%"}}
html_static_path: list[str] = []
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "notebooks"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports: list[str] = []
suppress_warnings = ["ref.python"]

#: Code as docstrings write it, between single backticks.
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))")


def readable(app, what, name, obj, options, lines):
    """Docstrings are written for people who read the source; here they become reStructuredText."""
    text = "\n".join(lines)
    text = CODE.sub(lambda m: f"``{m[1]}``" + ("\\ " if m[2] else ""), text)
    text = re.sub(r"(?<![`\w])\|(\w)\|", r"\\|\1\\|", text)
    text = re.sub(r"(?<=, )\*(?=\w+\])", r"\\*", text)
    found = text.split("\n")
    if what == "module":
        found = blocks(found)
    lines[:] = found


def blocks(lines):
    """A module's own tables ("file   what it holds") line by line, and its samples as code."""
    done: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("    ") and not inside and done and not done[-1]:
            inside = True
            done += ["::", ""]
        elif line and not line.startswith(" "):
            inside = False
        columns = re.match(r"^(\S+(?:, \S+)?)  +(\S.*)$", line)
        done.append(f"| ``{columns[1]}`` {columns[2]}" if columns and not inside else line)
    return done


def setup(app):
    # Before napoleon, which has 500.
    app.connect("autodoc-process-docstring", readable, priority=400)
