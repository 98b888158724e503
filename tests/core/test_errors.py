"""What is said when a package is missing, and that nothing said fetches a stranger's."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from atoll.errors import MissingPackage, pip_line, require

ROOT = Path(__file__).parent.parent.parent


def test_an_extra_is_told_by_what_it_is_made_of():
    line = pip_line("atoll[serve]")
    for package in ("cryptography", "msgspec", "sqlalchemy", "starlette", "uvicorn", "urllib3"):
        assert re.search(rf"'{package}[<>=]", line)
    assert "atoll" not in line
    assert """'uvloop>=0.21; sys_platform != "win32"'""" in line
    # Extras that name extras.
    both = pip_line("atoll[demo]")
    assert "scikit-learn" in both
    assert "starlette" in both
    assert "atoll" not in both
    assert pip_line("atoll[serve,tables]") == f"{line} 'pyarrow>=18'"
    assert pip_line("pyarrow>=18") == "pip install 'pyarrow>=18'"


def test_every_extra_that_is_advised_is_there():
    known = metadata.metadata("atoll").get_all("Provides-Extra")
    for path in (ROOT / "src").rglob("*.py"):
        for names in re.findall(r"atoll\[([a-z0-9,]+)\]", path.read_text(encoding="utf-8")):
            if names not in ("a,b", "a", "b"):
                assert set(names.split(",")) <= set(known), path


def test_no_page_advises_what_a_stranger_may_have_published():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"pip install[^\n`]*?'?\batoll\b(?!-)[^\n`]*", text)
        assert not found, (path, found)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(MissingPackage, match="does not import|run: pip install"):
        require("msgspec", "atoll[serve]", "A federation's server")
    with pytest.raises(MissingPackage, match="run: pip install 'nothing-of-this-name'"):
        require("nothing_of_this_name", "nothing-of-this-name", "This test")
