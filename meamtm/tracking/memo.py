"""`mlflow.json` in a run's folder: which MLflow run it is, on which server, and whether the server has all of it."""

import json
import logging
from pathlib import Path
from typing import Any

from meamtm.files import whole_file
from meamtm.tracking.server import hide_password
from meamtm.tracking.sink import Status

logger = logging.getLogger(__name__)
MEMO = "mlflow.json"


def remember(folder: Path, uri: str, run_id: str, end: Status | None = None) -> None:
    """Writes the memo, whole or not at all; `end` is how the run ended, once the server has taken all up to that."""
    memo = {"uri": hide_password(uri), "run_id": run_id, "end": end}
    with whole_file(folder / MEMO) as scratch:
        scratch.write_text(json.dumps(memo), encoding="utf-8")


def run_id_in(folder: Path, uri: str | None = None) -> str | None:
    """Gives the id of this folder's MLflow run, if it has one (on that server)."""
    return _memo(folder, uri).get("run_id")


def has_all(folder: Path, uri: str, end: Status = "FINISHED") -> bool:
    """Whether that server has taken everything of this folder's run, up to this end."""
    return _memo(folder, uri).get("end") == end


def warn_of_rest(what: object, error: Exception) -> None:
    """Says that MLflow lacks a part of something, and how it gets it."""
    logger.warning("%s; MLflow lacks a part of %s, which the same command sends later", error, what)


def _memo(folder: Path, uri: str | None) -> dict[str, Any]:
    try:
        memo = json.loads((folder / MEMO).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # a crash may have left half of it: the run begins anew
        return {}
    return memo if uri is None or memo["uri"] == hide_password(uri) else {}
