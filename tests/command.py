"""The `meamtm` command as a shell would run it, in this process: words in; exit code, output and errors out."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

import meamtm.cli


class Result(NamedTuple):
    """What a command left behind on the screen."""

    code: int
    out: str
    err: str


def meamtm_command(*words: object) -> Result:
    """Runs `meamtm WORDS...`; what it raises beyond an exit code is a failure of the test."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, _fresh_logging(), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["meamtm", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            meamtm.cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


@contextmanager
def _fresh_logging() -> Iterator[None]:
    """Takes pytest's handlers away, so that the command sets up its own as in a new process."""
    root, ours = logging.getLogger(), logging.getLogger("meamtm")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
