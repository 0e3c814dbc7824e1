"""One process at a time writes into a folder; the second one is told who does.

The lock belongs to the operating system, which lets go of it when its holder dies, however that comes about: nothing
is left to clean up. Who holds it stands in a file beside it, which is only for people to read."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from meamtm.errors import BusyError, ConfigError

LOCK, HOLDER = ".lock", ".holder.json"


@contextmanager
def held(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of a folder of ours while the block runs; the folder goes again if it stays empty.

    Raises BusyError, after `wait_s`, while another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder, wait_s)
    except Timeout as error:
        raise BusyError(
            f"{folder}: {_holder(folder)} is at work on it; wait for that process or stop it, or set another name"
        ) from error
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); name a folder that can") from error
    try:
        (folder / HOLDER).write_text(json.dumps(_me()), encoding="utf-8")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        if made and [path.name for path in folder.iterdir()] == [LOCK]:
            _remove(made)
        lock.release()


def _acquire(lock: FileLock, folder: Path, wait_s: float) -> None:
    """Takes a folder's lock; the folder is made again where its last holder takes it back meanwhile."""
    deadline_s = time.monotonic() + wait_s
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=max(0.0, deadline_s - time.monotonic()))
        except FileNotFoundError:
            continue
        return


def _remove(made: list[Path]) -> None:
    """Takes back the folders that were made for something that did not begin, innermost first."""
    (made[0] / LOCK).unlink()
    for path in made:
        with suppress(OSError):  # others have begun to use it
            path.rmdir()


def _me() -> dict[str, str | int]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or is about to end
        return "another process"
