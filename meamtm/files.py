"""Files and folders that appear whole or not at all."""

import fcntl
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which takes its place when the block ends, and vanishes when it raises.

    Another process may write the same meanwhile; the last one stays. The folder is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out` that takes its name when the block ends, and vanishes when it raises.

    Everything is on the disk before the name changes. A folder that has the name already is replaced, so the caller
    makes sure first that it may be. What a killed process left of an earlier attempt is removed.
    """
    out = Path(os.path.realpath(out))  # a link stays one, and what it leads to is replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    scratch = _beside(out, "part")
    scratch.mkdir()
    try:
        with _lock(scratch):
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
        with _lock(out, wait=True):  # another process may just have put its own there
            out.rename(old)
            try:
                scratch.rename(out)
            except OSError:
                old.rename(out)
                raise
            shutil.rmtree(old)
    sync(out.parent)


def _sweep(out: Path) -> None:
    """Removes what no living process holds: unfinished folders of this name, and replaced ones, of which the last comes
    back if its place is empty."""
    unfinished, replaced = (
        list(out.parent.glob(f".{glob.escape(out.name)}.{kind}-{8 * '[0-9a-f]'}")) for kind in ("part", "old")
    )
    replaced.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for left in [*unfinished, *replaced]:
        try:
            with _lock(left):
                if left in replaced and not out.exists():
                    left.rename(out)
                else:
                    shutil.rmtree(left)
        except OSError:  # another process is at work in it, or has just removed it
            continue


@contextmanager
def _lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder for as long as this process lives; OSError when another one does, unless it is waited for."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{uuid.uuid4().hex[:8]}")


def file_status(path: Path) -> os.stat_result | None:
    """Looks at a file; None where there is none, whatever its name is, or where there is something else."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name too long, or with a zero in it
        return None
    return found if stat.S_ISREG(found.st_mode) else None
