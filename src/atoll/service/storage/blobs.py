"""Blobs: bytes by their SHA-256, in a folder or in a bucket; durable before they are spoken of."""

from __future__ import annotations

import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from atoll.core.files import write_atomically
from atoll.errors import AtollError, CheckpointError, require

CHUNK = 1 << 20
MARK = "federation.id"
DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobMissing(AtollError):
    """There is no blob of this digest."""


class Blobs(ABC):
    """Content-addressed storage."""

    @abstractmethod
    def take(self, path: Path, digest: str) -> None:
        """Keep the contents of a finished, synced file; the file itself is used up."""

    @abstractmethod
    def size(self, digest: str) -> int:
        """Bytes of a blob; raises `BlobMissing`."""

    @abstractmethod
    def read(self, digest: str, start: int = 0, stop: int | None = None) -> Generator[bytes]:
        """The bytes from `start` to `stop` in pieces of at most 1 MiB."""

    @abstractmethod
    def local(self, digest: str, scratch: Path) -> Path:
        """A file with the contents, to be mapped; a copy in `scratch` where the blob is remote."""

    @abstractmethod
    def remove(self, digest: str) -> None:
        """Forget a blob, if it is there."""

    @abstractmethod
    def all(self) -> dict[str, float]:
        """All blobs: their digests, and when they were put (seconds since the epoch)."""

    @abstractmethod
    def claim(self, owner: str) -> None:
        """Mark the place as one federation's; raises `CheckpointError` if it is another's."""

    def put(self, pieces: Iterable[bytes | memoryview], scratch: Path) -> str:
        """Keep new contents; returns their digest once they are durable."""
        partial = scratch / f"put-{secrets.token_hex(16)}"
        body = sha256()
        write_atomically(partial, pieces, body)
        digest = body.hexdigest()
        self.take(partial, digest)
        return digest


class Folder(Blobs):
    """Blobs as files of a folder, spread over 256 folders within."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def take(self, path: Path, digest: str) -> None:
        target = self._path(digest)
        new = not target.parent.exists()
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        for folder in (target.parent, self.path)[: (1 + new) if os.name != "nt" else 0]:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def size(self, digest: str) -> int:
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            raise BlobMissing(f"there is no blob {digest}") from None

    def read(self, digest: str, start: int = 0, stop: int | None = None) -> Generator[bytes]:
        left = (self.size(digest) if stop is None else stop) - start
        with self._path(digest).open("rb") as file:
            file.seek(start)
            while left > 0 and (piece := file.read(min(CHUNK, left))):
                left -= len(piece)
                yield piece

    def local(self, digest: str, scratch: Path) -> Path:
        self.size(digest)
        return self._path(digest)

    def remove(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)

    def all(self) -> dict[str, float]:
        found = {}
        for path in self.path.glob("??/*"):
            if DIGEST.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found[path.name] = path.stat().st_mtime
        return found

    def claim(self, owner: str) -> None:
        mark = self.path / MARK
        if not mark.exists():
            write_atomically(mark, [owner.encode()])
        _check_owner(mark.read_text(encoding="utf-8"), owner, str(self.path))

    def _path(self, digest: str) -> Path:
        if not DIGEST.fullmatch(digest):
            raise BlobMissing(f"{digest!r} is not a SHA-256")
        return self.path / digest[:2] / digest


class Bucket(Blobs):
    """Blobs in S3, Google Cloud Storage or Azure, by URL, e.g. "s3://bucket/prefix".

    Credentials come from the environment, as the provider's own tools take them.
    """

    def __init__(self, url: str) -> None:
        obstore = require("obstore", "atoll[s3]", "blobs in a bucket")
        stores = require("obstore.store", "atoll[s3]", "blobs in a bucket")
        self._obstore: Any = obstore
        try:
            self._url, self._store = url, stores.from_url(url)
        except Exception as error:
            raise CheckpointError(f"the bucket {url} cannot be used: {error}") from error

    def take(self, path: Path, digest: str) -> None:
        with path.open("rb") as file:
            self._obstore.put(self._store, _key(digest), file)
        path.unlink()

    def size(self, digest: str) -> int:
        try:
            return int(self._obstore.head(self._store, _key(digest))["size"])
        except FileNotFoundError:
            raise BlobMissing(f"there is no blob {digest}") from None

    def read(self, digest: str, start: int = 0, stop: int | None = None) -> Generator[bytes]:
        end = self.size(digest) if stop is None else stop
        for at in range(start, end, CHUNK):
            piece = self._obstore.get_range(
                self._store, _key(digest), start=at, end=min(at + CHUNK, end)
            )
            yield bytes(piece)

    def local(self, digest: str, scratch: Path) -> Path:
        path = scratch / f"fetched-{digest}"
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                for piece in self.read(digest):
                    file.write(piece)
            os.replace(partial, path)
        return path

    def remove(self, digest: str) -> None:
        try:
            self._obstore.delete(self._store, _key(digest))
        except FileNotFoundError:
            return

    def all(self) -> dict[str, float]:
        found = {}
        for batch in self._obstore.list(self._store):
            for item in batch:
                found[item["path"].rpartition("/")[2]] = item["last_modified"].timestamp()
        return {name: at for name, at in found.items() if DIGEST.fullmatch(name)}

    def claim(self, owner: str) -> None:
        try:
            held = bytes(self._obstore.get(self._store, MARK).bytes()).decode()
        except FileNotFoundError:
            self._obstore.put(self._store, MARK, owner.encode())
            held = owner
        _check_owner(held, owner, self._url)


def _check_owner(held: str, owner: str, place: str) -> None:
    if held.strip() != owner:
        raise CheckpointError(
            f"the blobs in {place} are another federation's, which would be destroyed; give "
            f"another place (or remove {MARK} there, if that federation is no more)"
        )


def blobs_at(place: str) -> Blobs:
    """Blobs in a folder, or in a bucket by its URL."""
    return Bucket(place) if "://" in place else Folder(Path(place))


def _key(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise BlobMissing(f"{digest!r} is not a SHA-256")
    return f"{digest[:2]}/{digest}"
