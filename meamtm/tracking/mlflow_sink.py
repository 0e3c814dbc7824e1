"""Metrics of a step -> an MLflow run.

Ray's two helpers start a new run at every retry and send one request per metric. This sink continues the run it is
given, sends batches from a thread of its own, and outlives a server that goes away: nothing is lost or reordered, and
a point that is delivered twice is stored once, since it keeps its first time."""

import json
import logging
import math
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

from meamtm.tracking.mailbox import Call, Mailbox, Point
from meamtm.tracking.memo import remember, run_id_in
from meamtm.tracking.server import connect, explain, find_experiment, hide_password, insist, is_away, unusable
from meamtm.tracking.sink import Metrics, Status, outcome, read_rows

if TYPE_CHECKING:
    import mlflow.entities

logger = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
ENTRIES_PER_REQUEST = 100
LONGEST_PARAM = 6000
LONGEST_TAG = 5000
TEXT = {".yaml", ".yml", ".json", ".txt", ".csv", ".md"}


@dataclass(frozen=True)
class _Open:
    """A started run: with which client, which one, and the way to it."""

    client: "mlflow.MlflowClient"
    run_id: str
    mailbox: Mailbox

    def put(self, what: str, **entries: Any) -> None:
        """Puts params or tags in line."""
        self.mailbox.put(Call(what, partial(self.client.log_batch, self.run_id, **entries)))


class MLflowSink:
    """One MLflow run.

    `run_id` continues a run, where the server still has it. `folder` is the run's own: its `metrics.jsonl` has points
    that the server may lack, and its memo says which run to continue. Closing waits for at most `close_wait_s`."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        *,
        run_id: str | None = None,
        parent_run_id: str | None = None,
        folder: Path | None = None,
        close_wait_s: float = 30.0,
    ) -> None:
        self.uri, self.experiment, self.run_name = uri, experiment, run_name
        self.run_id, self.parent_run_id = run_id, parent_run_id
        if run_id is None and folder is not None:
            self.run_id = run_id_in(folder, uri)
        self._folder, self._close_wait_s = folder, close_wait_s
        self._known: set[tuple[str, int, float]] = set()  # points that the run has already, when it is continued
        self._open: _Open | None = None
        self._files: list[Call] = []
        self._spool: Path | None = None

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], from_step: int = 0) -> None:
        """Creates or continues the run; raises ServiceError within ten seconds if the service does not answer."""
        client = connect(self.uri)
        texts = {key: _shorten(hide_password(_text(value)), LONGEST_PARAM) for key, value in params.items()}
        try:
            experiment_id = find_experiment(client, self.uri, self.experiment)
            known = self._continue(client) or insist(lambda: client.create_run(experiment_id, run_name=self.run_name))
        except Exception as error:
            raise unusable(self.uri, error) from None
        self.run_id = known.info.run_id
        send = partial(_send, client, self.run_id)
        mailbox = Mailbox(send, is_away, explain, name=f"MLflow at tracking.uri={hide_password(self.uri)}")
        self._open = _Open(client, self.run_id, mailbox)
        if self._folder is not None:
            remember(self._folder, self.uri, self.run_id)
        self._describe(texts, tags, known.data.params)
        self._catch_up(from_step)

    def log(self, metrics: Metrics, step: int) -> None:
        """Puts the metrics in line and returns; never blocks, never raises."""
        self._log_at(metrics, step, time.time())

    def tag(self, tags: Mapping[str, str]) -> None:
        """Puts further tags in line; as with `log`, a server that is away costs nothing here."""
        from mlflow.entities import RunTag

        if self._open is not None:
            marks = [RunTag(key, _shorten(hide_password(str(value)), LONGEST_TAG)) for key, value in tags.items()]
            for first in range(0, len(marks), ENTRIES_PER_REQUEST):
                self._open.put("tags", tags=marks[first : first + ENTRIES_PER_REQUEST])

    def adopt(self, run_ids: Sequence[str]) -> None:
        """Puts in line that these runs are shown below this one."""
        if self._open is None:
            return
        client, parent = self._open.client, self._open.run_id
        for run_id in run_ids:
            self._open.mailbox.put(Call(f"{PARENT} of {run_id}", partial(client.set_tag, run_id, PARENT, parent)))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Takes a copy of the file, with passwords of URIs hidden if it is text. It is sent after the run's end, since
        a server's artifact store may fail alone, and is to hold up nothing else."""
        if self._open is None:
            return
        try:
            copy = self._copy(path)
        except OSError as error:
            logger.warning("%s is not sent to MLflow (%s)", path, explain(error))
            return
        send = partial(self._open.client.log_artifact, self._open.run_id, str(copy), folder or None)
        self._files.append(Call(path.name, send))

    def close(self, status: Status = "FINISHED", wait_s: float | None = None) -> None:
        """Sends what is left, then the run's end, then files; warns of what could not be sent in time."""
        run, self._open = self._open, None
        files, self._files = self._files, []
        if run is None:
            return
        has_ended = Event()

        def end() -> None:
            run.client.set_terminated(run.run_id, status)
            has_ended.set()

        run.mailbox.put(Call(f"the end of run {run.run_id}", end), *files)
        left = run.mailbox.close(self._close_wait_s if wait_s is None else wait_s)
        if left:
            num_points = sum(isinstance(item, Point) for item in left)
            lost = f"the last {num_points} points of run {run.run_id}, which it shows as RUNNING"
            if has_ended.is_set():
                lost = f"{len(left)} of the {len(files)} files of run {run.run_id}"
            where = hide_password(self.uri)
            logger.warning("MLflow at tracking.uri=%s did not take %s; the same command sends them", where, lost)
        elif self._folder is not None and has_ended.is_set():  # it may have been refused
            try:
                remember(self._folder, self.uri, run.run_id, status)
            except OSError as error:
                logger.warning("%s: cannot be written (%s); all is sent once more", self._folder, explain(error))
        if self._spool is not None:
            shutil.rmtree(self._spool, ignore_errors=True)

    def __enter__(self) -> "MLflowSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(outcome(kind))

    def _continue(self, client: "mlflow.MlflowClient") -> "mlflow.entities.Run | None":
        """Opens the run that was given and notes which points it has; None if there is none, or it is gone."""
        if self.run_id is None:
            return None
        run_id, where = self.run_id, hide_password(self.uri)
        try:
            run = insist(lambda: client.get_run(run_id))
        except Exception as error:
            if is_away(error):
                raise
            logger.warning("tracking.uri=%s does not know run %s (%s); a new one begins", where, run_id, explain(error))
            return None
        if run.info.lifecycle_stage != "active":
            logger.warning("run %s was deleted on tracking.uri=%s; a new one begins", run_id, where)
            return None
        for key in run.data.metrics:
            history = insist(lambda key=key: client.get_metric_history(run_id, key))
            self._known |= {(key, point.step, point.value) for point in history}
        insist(lambda: client.update_run(run_id, status="RUNNING"))
        return run

    def _describe(self, params: Mapping[str, str], tags: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Sends params and tags; a param that another start of this run gave otherwise becomes a tag `changed.KEY`."""
        from mlflow.entities import Param

        assert self._open is not None
        changed = {f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        entries = [Param(key, value) for key, value in params.items() if key not in known]
        for first in range(0, len(entries), ENTRIES_PER_REQUEST):
            self._open.put("params", params=entries[first : first + ENTRIES_PER_REQUEST])
        parent = {PARENT: self.parent_run_id} if self.parent_run_id is not None else {}
        self.tag({**changed, **tags, **parent})

    def _catch_up(self, from_step: int) -> None:
        """Sends what was logged up to that step and never arrived, since its process died too early."""
        if self._folder is None:
            return
        for row in read_rows(self._folder / "metrics.jsonl"):
            step, time_s = int(row.pop("step")), row.pop("time", 0.0)
            if step <= from_step:
                self._log_at({key: value for key, value in row.items() if math.isfinite(value)}, step, time_s)

    def _log_at(self, metrics: Metrics, step: int, time_s: float) -> None:
        if self._open is None:
            return
        values = {re.sub(r"[^\w\-./: ]", "_", key): float(value) for key, value in metrics.items()}
        points = [Point(key, value, int(time_s * 1000), step) for key, value in values.items()]
        self._open.mailbox.put(*(point for point in points if (point.key, step, point.value) not in self._known))

    def _copy(self, path: Path) -> Path:
        """Copies a file to where it stays until it is sent, under its own name."""
        if self._spool is None:
            self._spool = Path(tempfile.mkdtemp(prefix="meamtm-artifacts-"))
        copy = Path(tempfile.mkdtemp(dir=self._spool)) / path.name
        if path.suffix in TEXT:
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            copy.write_text(hide_password(text), encoding="utf-8", errors="surrogateescape")
        else:
            shutil.copyfile(path, copy)
        return copy


def _send(client: "mlflow.MlflowClient", run_id: str, points: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(point.key, point.value, point.time_ms, point.step) for point in points])


def _text(value: Any) -> str:
    """Writes a value as YAML and the command line do: null, true, [16, 16]."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _shorten(text: str, longest: int) -> str:
    note = f"... ({len(text)} characters)"
    return text if len(text) <= longest else text[: longest - len(note)] + note
