"""A folder that appears whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out` that takes its name when the block ends, and vanishes when it raises.

    Everything is on the disk before the name changes. A folder that has the name already is replaced, so the caller
    makes sure first that it may be.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = _beside(out, "part")
    scratch.mkdir()
    try:
        yield scratch
        _sync(scratch)
        _put(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put(scratch: Path, out: Path) -> None:
    if not out.exists():
        scratch.rename(out)
    else:
        old = _beside(out, "old")
        out.rename(old)
        try:
            scratch.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old)
    _sync_one(out.parent)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{uuid.uuid4().hex[:8]}")
