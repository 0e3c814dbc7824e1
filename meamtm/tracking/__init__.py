"""What a run measured -> where people look for it.

`open_sink` gives a run its record: JSON lines in its own folder, always, and MLflow where the configuration asks for
it. Importing this package loads neither MLflow nor matplotlib; they come with the first call that needs them."""

import json
from pathlib import Path

from meamtm.config import TrackingConfig
from meamtm.tracking.figures import confusion_figure, curves_figure, per_class, per_class_table
from meamtm.tracking.mlflow_sink import MLflowSink
from meamtm.tracking.server import finish_orphans, hide_password, how_to_open, resolve_uri
from meamtm.tracking.sink import JsonLines, Metrics, Sink, Sinks, Status, append_row, read_rows

__all__ = [
    "JsonLines",
    "MLflowSink",
    "Metrics",
    "Sink",
    "Sinks",
    "Status",
    "append_row",
    "confusion_figure",
    "curves_figure",
    "finish_orphans",
    "hide_password",
    "how_to_open",
    "open_sink",
    "per_class",
    "per_class_table",
    "read_rows",
    "resolve_uri",
    "run_id_in",
]

MEMO = "mlflow.json"


def open_sink(tracking: TrackingConfig, folder: Path, run_name: str) -> Sinks:
    """Returns the sinks of the run in this folder, not yet started: `metrics.jsonl`, and MLflow if `tracking.mlflow`.

    The MLflow run's id is kept in `mlflow.json` there, so that the same folder on the same server continues the same
    run, and points that never reached the server are sent from `metrics.jsonl`."""
    lines = folder / "metrics.jsonl"
    if not tracking.mlflow:
        return Sinks(JsonLines(lines))
    uri = resolve_uri(tracking)
    remote = MLflowSink(
        uri,
        tracking.experiment,
        run_name,
        run_id=run_id_in(folder, uri),
        history=lines,
        memo=folder / MEMO,
    )
    return Sinks(remote, JsonLines(lines))  # MLflow first: a server that is away stops the run before a file changes


def run_id_in(folder: Path, uri: str | None = None) -> str | None:
    """Gives the id of this folder's MLflow run, if it has one (on that server)."""
    try:
        memo = json.loads((folder / MEMO).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # a crash may have left half of it: the run begins anew
        return None
    return memo["run_id"] if uri is None or memo["uri"] == hide_password(uri) else None
