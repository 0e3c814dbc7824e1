"""What a run's workers and the process that started them tell each other, by files in the run folder: metrics one way,
the wish to stop the other. Files survive whoever wrote them; Ray loses the last reports of a worker that dies."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from meamtm.tracking import Metrics, Sink, append_row, read_rows

REPORTS, STOP = ".reports.jsonl", ".stop"
POLL_S = 0.2


def leave_report(folder: Path, metrics: Metrics) -> None:
    """Leaves an epoch's metrics for whoever keeps the record."""
    append_row(folder / REPORTS, metrics, int(metrics["epoch"]))


def left_reports(folder: Path) -> list[dict[str, float]]:
    """Gives the metrics of each epoch that workers have left; one that they trained again comes again."""
    rows = read_rows(folder / REPORTS)
    return [{key: value for key, value in row.items() if key not in ("step", "time")} for row in rows]


def is_told_to_stop(folder: Path, by: str = "") -> bool:
    """Tells whether the workers should save and return."""
    return (folder / f"{STOP}{by}").exists()


@contextmanager
def following(folder: Path, sinks: Sequence[Sink]) -> Iterator[None]:
    """Tells the sinks what a run's workers report into its folder while the block runs.

    What workers reported after their driver died comes first. After a restart of workers epochs come again, with the
    same numbers, and are left out. What a sink cannot take, as on a full disk, is an OSError once the block ends, and
    the reports stay for the next call."""
    reports, ended = folder / REPORTS, Event()
    known = read_rows(folder / "metrics.jsonl")

    def follow() -> None:
        last, size_bytes, is_last_look = int(known[-1]["step"]) if known else 0, 0, False
        while not is_last_look:
            is_last_look = ended.wait(POLL_S)
            if not reports.exists() or reports.stat().st_size == size_bytes:
                continue
            size_bytes = reports.stat().st_size
            for metrics in left_reports(folder):
                if (step := int(metrics["epoch"])) > last:
                    for sink in sinks:
                        sink.log(metrics, step)
                    last = step

    with ThreadPoolExecutor(1, thread_name_prefix="reports of workers") as pool:
        followed = pool.submit(follow)
        try:
            yield
        finally:
            ended.set()
        followed.result()
    reports.unlink(missing_ok=True)


@contextmanager
def stop_sign(folder: Path, by: str = "") -> Iterator[Path]:
    """Gives the file that asks all workers to stop, wherever they are; there is none at first and in the end, nor a
    folder that holds nothing else.

    Who does not hold the folder's lock says who it is, since another process may be at work on the run."""
    sign = folder / f"{STOP}{by}"
    sign.unlink(missing_ok=True)
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)
        with suppress(OSError):  # it holds what the run has made, or was never there
            folder.rmdir()
