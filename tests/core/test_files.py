"""Folders that are ours, and those that are not."""

from __future__ import annotations

import pytest

from atoll.core.files import own_folder
from atoll.errors import ConfigurationError


def test_only_an_empty_folder_or_our_own_is_closed_to_others(tmp_path):
    own_folder(tmp_path / "new" / "deep", "site.json")
    assert (tmp_path / "new" / "deep").stat().st_mode & 0o777 == 0o700
    (tmp_path / "empty").mkdir()
    own_folder(tmp_path / "empty", "site.json")
    (tmp_path / "empty" / "site.json").write_text("{}")
    own_folder(tmp_path / "empty", "site.json", "key.pem")
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    (theirs / "thesis.tex").write_text("")
    with pytest.raises(ConfigurationError, match="holds other things"):
        own_folder(theirs, "site.json")
    assert theirs.stat().st_mode & 0o777 == 0o755


def test_no_command_takes_the_rights_of_a_folder_that_is_not_ours(tmp_path, capsys):
    """The root of a machine was once closed to everybody else by `atoll enrol --folder /`."""
    pytest.importorskip("cryptography")
    from atoll.cli import main
    from atoll.protocol.identity import Token

    (tmp_path / "thesis.tex").write_text("")
    before = tmp_path.stat().st_mode
    token = str(Token.fresh("00" * 32))
    for word in (token, "none", ""):
        words = ["enrol", "https://127.0.0.1:9", "--token", word, "--folder", str(tmp_path)]
        assert main(words) != 0
        assert capsys.readouterr().err
    assert tmp_path.stat().st_mode == before
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
