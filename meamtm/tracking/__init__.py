"""What a run measured -> where people look for it.

`open_sink` gives a run its record: JSON lines in its own folder, always, and MLflow where the configuration asks for
it. Importing this package loads neither MLflow nor matplotlib; they come with the first call that needs them."""

import json
from pathlib import Path

from meamtm.config import TrackingConfig
from meamtm.tracking.figures import confusion_figure, curves_figure, per_class_table
from meamtm.tracking.mlflow_sink import MLflowSink
from meamtm.tracking.server import finish_orphans, hide_password, how_to_open, resolve_uri
from meamtm.tracking.sink import JsonLines, Metrics, Sink, Sinks, Status, read_rows

__all__ = [
    "JsonLines",
    "MLflowSink",
    "Metrics",
    "Sink",
    "Sinks",
    "Status",
    "confusion_figure",
    "curves_figure",
    "finish_orphans",
    "hide_password",
    "how_to_open",
    "open_sink",
    "per_class_table",
    "read_rows",
    "resolve_uri",
]


def open_sink(tracking: TrackingConfig, folder: Path, run_name: str, *, parent_run_id: str | None = None) -> Sinks:
    """Returns the sinks of the run in this folder, not yet started: `metrics.jsonl`, and MLflow if `tracking.mlflow`.

    The MLflow run's id is kept in `mlflow.json`, so that the same folder on the same server continues the same run,
    and points that never reached the server are sent from `metrics.jsonl`."""
    lines = folder / "metrics.jsonl"
    if not tracking.mlflow:
        return Sinks(JsonLines(lines))
    uri = resolve_uri(tracking)
    remote = MLflowSink(
        uri,
        tracking.experiment,
        run_name,
        run_id=_remembered(folder / "mlflow.json", uri),
        parent_run_id=parent_run_id,
        history=lines,
        memo=folder / "mlflow.json",
    )
    return Sinks(remote, JsonLines(lines))  # MLflow first: a server that is away stops the run before a file changes


def _remembered(memo: Path, uri: str) -> str | None:
    """Gives the run id that this folder had on this server."""
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return known.get("run_id") if known.get("uri") == hide_password(uri) else None
