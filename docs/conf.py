"""Sphinx configuration."""

import atoll

project = "atoll"
author = "the atoll authors"
release = atoll.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "atoll"
html_static_path: list[str] = []
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "notebooks"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports: list[str] = []
suppress_warnings = ["ref.python", "docutils"]
