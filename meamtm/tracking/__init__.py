"""What a run measured -> where people look for it.

`open_sink` gives a run its record: JSON lines in its own folder, always, and MLflow where the configuration asks for
it. Importing this package loads neither MLflow nor matplotlib; they come with the first call that needs them."""

from pathlib import Path

from meamtm.config import TrackingConfig
from meamtm.tracking.commit import JOB_COMMIT, commit_of, commit_of_this_code
from meamtm.tracking.figures import confusion_figure, curves_figure, folds_figure, per_class, per_class_table
from meamtm.tracking.memo import has_all, run_id_in, warn_of_rest
from meamtm.tracking.mlflow_sink import MLflowSink
from meamtm.tracking.server import finish_orphans, hide_password, how_to_open, resolve_uri
from meamtm.tracking.sink import JsonLines, Listener, Metrics, Sink, Sinks, Status, append_row, read_rows, write_rows

__all__ = [
    "JOB_COMMIT",
    "JsonLines",
    "Listener",
    "MLflowSink",
    "Metrics",
    "Sink",
    "Sinks",
    "Status",
    "append_row",
    "commit_of",
    "commit_of_this_code",
    "confusion_figure",
    "curves_figure",
    "finish_orphans",
    "folds_figure",
    "has_all",
    "hide_password",
    "how_to_open",
    "open_mlflow",
    "open_sink",
    "per_class",
    "per_class_table",
    "read_rows",
    "resolve_uri",
    "run_id_in",
    "warn_of_rest",
    "write_rows",
]


def open_sink(tracking: TrackingConfig, folder: Path, run_name: str) -> Sinks:
    """Returns the sinks of the run in this folder, not yet started: `metrics.jsonl`, and MLflow where it is wanted."""
    lines = JsonLines(folder / "metrics.jsonl")
    if not tracking.mlflow:
        return Sinks(lines)
    # MLflow first: a server that is away stops the run before a file changes
    return Sinks(open_mlflow(tracking, folder, run_name), lines)


def open_mlflow(tracking: TrackingConfig, folder: Path, run_name: str) -> MLflowSink:
    """Returns the MLflow run of this folder, not yet started.

    Its id is kept in `mlflow.json` there, so that the same folder on the same server continues the same run, and points
    that never reached the server are sent from `metrics.jsonl`."""
    return MLflowSink(resolve_uri(tracking), tracking.experiment, run_name, folder=folder)
