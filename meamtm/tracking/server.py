"""`tracking.uri` -> an MLflow client that is known to answer, and that keeps quiet on the user's screen.

Everything that is particular to MLflow stores is here: absolute SQLite paths, the first migration under a lock,
short time limits, passwords kept out of every message. MLflow itself is imported on the first call."""

import logging
import os
import re
import shlex
import socket
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock

from meamtm.config import TrackingConfig
from meamtm.errors import ConfigError, ServiceError
from meamtm.files import whole_file
from meamtm.tracking.sink import Status

if TYPE_CHECKING:
    import mlflow

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ANSWER_S = 4.0
"""A server that takes longer for a first, small answer is taken to be away."""

MANNERS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the mailbox tries again itself; MLflow's 7 retries take minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # MLflow's 120 s would outlast every wait of ours
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "-1",  # a store's calls take two connections each; 15 block one another
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run talks to nobody whom its configuration does not name
}
"""Environment defaults for MLflow in this process; a value that the user has set stays."""

CAUSES = (
    "Connection refused",
    "Connection aborted",
    "Connection reset",
    "timed out",
    "Name or service not known",
    "Network is unreachable",
    "too many 500 error responses",
    "Max retries exceeded",
)
"""What matters in the long lines of the HTTP libraries, the most telling first."""

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def resolve_uri(tracking: TrackingConfig) -> str:
    """Gives the URI that every process can use: `tracking.uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` here.

    SQLite paths become absolute, since Ray workers run in folders of their own. Raises ConfigError for stores that
    MLflow no longer writes to, that forget, or whose path no URI can hold."""
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise ConfigError(f"tracking.uri={hide_password(uri)}: is no address ({error}); correct it") from error
    if scheme in ("", "file") and uri != "databricks":
        remedy = "name a database, sqlite:///mlflow.db, or a server, http://HOST:5000"
        raise ConfigError(
            f"tracking.uri={hide_password(uri)}: MLflow keeps no runs in plain folders any more; {remedy}"
        )
    if not scheme.startswith("sqlite"):
        return uri
    path, mark, options = uri.partition(":///")[2].partition("?")
    if path in ("", ":memory:"):
        raise ConfigError(
            f"tracking.uri={uri}: a database in memory ends with its process; name a file, sqlite:///mlflow.db"
        )
    place = str(Path(path).expanduser().absolute())
    if "%" in place or "?" in place:  # SQLAlchemy 2.1 decodes the path, 2.0 and MLflow do not
        raise ConfigError(f"tracking.uri={uri}: the path {place} must not hold % or ?; put the database elsewhere")
    return f"{scheme}:///{place}{mark}{options}"


def hide_password(text: str) -> str:
    """Replaces user names and passwords in URIs (`http://user:pass@host`, `?password=...`) by `***`."""
    text = re.sub(r"://[^\s'\"]*@", "://***@", text)
    return re.sub(r"(?i)((?:password|passwd|pwd|token|secret)=)[^&\s'\"]+", r"\1***", text)


def how_to_open(uri: str, run_id: str | None = None) -> str:
    """Says in a sentence how to look at the runs there, or at one of them."""
    page = f"/#/runs/{run_id}" if run_id else ""
    shown = hide_password(uri).rstrip("/")
    if urlsplit(uri).scheme in ("http", "https"):
        return f"open {shown}{page}"
    return f"run `mlflow ui --backend-store-uri {shlex.quote(shown)}` and open http://127.0.0.1:5000{page}"


def connect(uri: str) -> "mlflow.MlflowClient":
    """Returns a client of a service that has just answered; raises ServiceError within seconds otherwise."""
    for name, value in MANNERS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own dependencies; there is nothing that our user could do
        from mlflow import MlflowClient

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs whole stack traces of what we retry
        try:
            _check(uri)
            return MlflowClient(tracking_uri=uri)
        except Exception as error:
            raise unusable(uri, error) from None  # MLflow's message may hold the password


def unusable(uri: str, error: Exception) -> ServiceError:
    """Puts whatever went wrong with a service into the user's words."""
    if isinstance(error, ServiceError):
        return error
    rule = "does not answer" if is_away(error) else "cannot be used"
    remedy = "start the server or correct tracking.uri"
    if not is_away(error):
        remedy = (
            "correct tracking.uri, MLFLOW_TRACKING_USERNAME and _PASSWORD or _TOKEN, or the server's --allowed-hosts"
        )
    if urlsplit(uri).scheme.startswith("sqlite"):
        remedy = "take another file, or upgrade an old one by `mlflow db upgrade`"
    without = "or go without by tracking.mlflow=false"
    return ServiceError(f"tracking.uri={hide_password(uri)} {rule} ({explain(error)}); {remedy}, {without}")


def is_away(error: Exception) -> bool:
    """Tells a service that may answer later (connection, time limit, overload, locked database) from a refusal."""
    import requests
    from mlflow.exceptions import MlflowException

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and isinstance(error, MlflowException):
        status = error.get_http_status_code()
    if status is not None:
        return status in (408, 429, 500, 502, 503, 504)
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror | requests.RequestException)


def explain(error: Exception) -> str:
    """Gives the first line of an error, shortened and without passwords."""
    line = hide_password(str(error)).strip().partition("\n")[0]
    text = next((cause.lower() for cause in CAUSES if cause in line), line or type(error).__name__)
    return text if len(text) <= 160 else f"{text[:157]}..."


def insist(call: Callable[[], Result], wait_s: float = 8.0) -> Result:
    """Repeats a call while the service is busy, as a database is that several processes open at once."""
    deadline_s, pause_s = time.monotonic() + wait_s, 0.1
    while True:
        try:
            return call()
        except Exception as error:
            if not is_away(error) or time.monotonic() + pause_s > deadline_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def find_experiment(client: "mlflow.MlflowClient", uri: str, name: str) -> str:
    """Returns the id of the experiment, which is created if nobody else does so first."""
    from mlflow.exceptions import MlflowException

    location = str(artifact_folder(uri) / re.sub(r"[^\w.-]", "_", name)) if uri.startswith("sqlite") else None
    experiment = insist(lambda: client.get_experiment_by_name(name))
    if experiment is None:
        try:
            return insist(lambda: client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            experiment = insist(lambda: client.get_experiment_by_name(name))
            if experiment is None:
                raise unusable(uri, error) from None
    if experiment.lifecycle_stage != "active":
        raise ServiceError(
            f"tracking.experiment={name} was deleted on {hide_password(uri)}; restore it there, or take another name"
        )
    return experiment.experiment_id


def artifact_folder(uri: str) -> Path:
    """Where the artifacts of a SQLite store lie: `mlartifacts` beside the database."""
    return _sqlite_path(uri).parent / "mlartifacts"


def finish_orphans(
    uri: str, run_ids: Iterable[str] = (), *, parent_run_id: str | None = None, status: Status = "KILLED"
) -> int:
    """Ends those runs, and the children of that parent, that are still RUNNING since their process died.

    Returns how many it ended. A service that does not answer, or has lost a run, costs a warning."""
    num_ended = 0
    try:
        client = connect(uri)
        children = _children(client, parent_run_id) if parent_run_id is not None else []
        for run_id in {*run_ids, *children}:
            num_ended += _end_if_running(client, run_id, status)
    except Exception as error:  # this is called while cleaning up, and must not hide what led to that
        logger.warning("runs may be left RUNNING: %s", unusable(uri, error))
    return num_ended


def _children(client: "mlflow.MlflowClient", parent_run_id: str) -> list[str]:
    parent = insist(lambda: client.get_run(parent_run_id))
    mine = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    run_ids: list[str] = []
    token = None
    while True:
        page = insist(lambda token=token: client.search_runs([parent.info.experiment_id], mine, page_token=token))
        run_ids += [run.info.run_id for run in page]
        token = page.token
        if not token:
            return run_ids


def _end_if_running(client: "mlflow.MlflowClient", run_id: str, status: Status) -> bool:
    try:
        if insist(lambda: client.get_run(run_id)).info.status not in ("RUNNING", "SCHEDULED"):
            return False
        insist(lambda: client.set_terminated(run_id, status))
    except Exception as error:
        if is_away(error):
            raise
        logger.warning("run %s is not ended (%s)", run_id, explain(error))
        return False
    return True


def _check(uri: str) -> None:
    """Asks for a first answer, in seconds; MLflow itself would insist for minutes."""
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    if kind in ("http", "https"):
        _check_http(uri)
    elif kind == "sqlite":
        _prepare_sqlite(uri)
    elif kind in DATABASE_PORTS and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or DATABASE_PORTS[kind]), timeout=ANSWER_S).close()


def _check_http(uri: str) -> None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    path = "/api/2.0/mlflow/experiments/search"
    creds = get_default_host_creds(uri)
    answer = http_request(creds, path, "POST", json={"max_results": 1}, timeout=ANSWER_S, max_retries=0)
    assert answer is not None
    if answer.status_code in (200, 404, 405, 501) and "json" not in answer.headers.get("Content-Type", ""):
        raise ServiceError(
            f"tracking.uri={hide_password(uri)} is not an MLflow server; correct it, or set tracking.mlflow=false"
        )
    verify_rest_response(answer, path)


def _prepare_sqlite(uri: str) -> None:
    """Creates and migrates the database unless it exists; one process does it, the others wait.

    A new one appears whole: MLflow takes seconds to fill it, and opens none that an interrupt has left half full."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = _sqlite_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=120):
        if not path.exists() or path.stat().st_size == 0:
            with whole_file(path) as scratch:
                SqlAlchemyStore(f"sqlite:///{scratch}", str(artifact_folder(uri))).engine.dispose()
        connection = sqlite3.connect(path)  # MLflow would try for 100 s to open what cannot be opened
        try:
            connection.execute("SELECT count(*) FROM sqlite_master")
        finally:
            connection.close()
        SqlAlchemyStore(uri, str(artifact_folder(uri)))  # the client's own default is a folder of the worker


def _sqlite_path(uri: str) -> Path:
    return Path(uri.partition(":///")[2].partition("?")[0])
