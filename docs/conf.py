"""How Sphinx builds this documentation: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

_PYPROJECT = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")

project = "pg_eventstream"
[version] = re.findall(r'^version = "(.*)"', _PYPROJECT, re.MULTILINE)
release = version

extensions = ["myst_parser"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4  # Each heading has the anchor that a forge gives it.

html_theme = "furo"
html_title = "pg_eventstream"
html_copy_source = False
