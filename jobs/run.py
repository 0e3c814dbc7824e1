"""On the cluster: KIND and its words -> the command that a terminal would run, by the same code.

`python -m jobs.run train configs/esc10.yaml optim.lr=1e-3` is `meamtm train configs/esc10.yaml optim.lr=1e-3` on the
job's own cluster. A stop request reaches it as Ctrl-C would, so that every MLflow run gets its final state."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from meamtm.screen import end_at_once


def run(words: Sequence[str]) -> None:
    """Runs one command of this project; ends as that command ends (SystemExit)."""
    kind, *arguments = words
    # Ray gives a job its cluster's address; by hand, on a head node, the node's own cluster is meant.
    os.environ.setdefault("RAY_ADDRESS", "auto")
    stop_as_ctrl_c()
    match kind:
        case "train" | "crossval" | "pack":
            from meamtm.cli import main

            sys.argv = ["meamtm", kind, *arguments]
        case "tune" | "nested":
            from tune.__main__ import main

            sys.argv = ["tune", *([kind] if kind == "nested" else []), *arguments]
        case _:
            sys.exit(f"{kind}: no such kind of job; jobs are train, crossval, tune, nested or pack")
    main()


def stop_as_ctrl_c() -> None:
    """Lets SIGINT interrupt this process, whatever its parents made of it, and SIGTERM do the same.

    A process inherits an ignored SIGINT from a shell that started the cluster in the background, and a blocked one from
    Ray's own processes; Python then never raises KeyboardInterrupt. Tune and Train replace the handler by their own,
    which end a study or a run cleanly.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    end_at_once(lambda: run(sys.argv[1:]))
