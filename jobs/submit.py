"""A Submission -> a job on the cluster: its ID, its log as it is written, its end.

Every answer of the cluster that is not the expected one becomes one ServiceError that names the address and the remedy.
Ray's own client waits for ever on a server that accepts a connection and says nothing; this one does not."""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.spec import Submission, conceal, is_this_machine
from meamtm.errors import ConfigError, ServiceError
from meamtm.tracking import hide_password

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
FIRST_ANSWER_S = 5.0
# Uploading the working folder, and a dashboard agent that is just starting, take their time.
ANSWER_S = 120.0
POLL_S = 0.5
TELL_S = 5.0
"""A job that has not begun so long after it could have waits for something that the user should know."""
AGENT_S = 30.0
"""How long a cluster that answers may take until it takes jobs; Ray's own server waits for ten seconds of it."""
NO_AGENT = "No available agent"
REMEDY = (
    "the cluster asks for a token: make one where it runs (`ray get-auth-token --generate`) before `ray start`, then "
    "here set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (or keep the token in ~/.ray/auth_token)"
)


class NotReadyError(ServiceError):
    """The cluster answers, and no node of it takes jobs yet."""


class Cluster(JobSubmissionClient):
    """A cluster's job server that answers in time, or says why not."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        wait_s = FIRST_ANSWER_S if endpoint == "/api/version" else ANSWER_S
        try:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, wait_s), **options)
        except AuthenticationError as error:
            wrong = "was refused" if "failed" in str(error) else "is missing"
            raise ServiceError(f"{hide_password(self._address)}: the token {wrong}; {REMEDY}") from error
        except requests.RequestException as error:
            raise _silent(self._address) from error

    def _raise_error(self, r: requests.Response) -> NoReturn:
        address = hide_password(self._address)
        if r.status_code == requests.codes.not_found and "/api/jobs/" in r.url:
            raise ServiceError(f"{address}: no job of that ID ({_last_line(r.text)}); `python -m jobs list` names them")
        if r.status_code == requests.codes.request_entity_too_large:
            raise ConfigError(
                "working_dir: its copy is larger than a cluster takes (100 MiB); keep data elsewhere, "
                "or name what is large in excludes or .gitignore"
            )
        if NO_AGENT in r.text:
            raise NotReadyError(
                f"{address} takes no jobs after {AGENT_S:g} s: the agent of its node has not started; where another "
                f"Ray runs on that machine, start this one with `ray start --head --dashboard-agent-listen-port=0`"
            )
        raise ServiceError(
            f"{address} refused {r.request.method} {r.request.path_url} ({r.status_code}: {_last_line(r.text)}); "
            f"its own log, under /tmp/ray/session_latest/logs, tells more"
        )


def connect(address: str) -> Cluster:
    """Reaches a cluster's job server; raises ServiceError within ten seconds otherwise."""
    # They report what we report ourselves, and that .venv and .git are left out, as is asked for.
    for chatty in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)
    with _only(address):
        try:
            return Cluster(address, headers=_authorization(address))
        except AuthenticationError as error:
            raise ServiceError(f"{hide_password(address)}: no token found here; {REMEDY}") from error
        except (requests.RequestException, RuntimeError, KeyError) as error:
            raise ServiceError(
                f"{hide_password(address)} answers, but not as Ray's dashboard does ({_last_line(str(error))}); "
                f"check the port: a head node prints its own when it starts"
            ) from error


def submit(cluster: Cluster, submission: Submission) -> str:
    """Copies the working folder and starts the job; returns its ID without waiting for it.

    A cluster that has just started takes some seconds until it takes jobs; it is asked again meanwhile.
    """
    deadline_s = time.monotonic() + AGENT_S
    while True:
        try:
            return cluster.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.id,
                runtime_env=submission.runtime_env,
                entrypoint_num_cpus=submission.cpus,
                entrypoint_num_gpus=submission.gpus,
            )
        except NotReadyError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(POLL_S)


def details(cluster: Cluster, job_id: str) -> JobDetails:
    """Tells what the cluster knows of a job; raises ConfigError for what is no ID, which Ray would take for another
    page of its own."""
    if not job_id or "/" in job_id:
        raise ConfigError(f"{job_id!r}: is no ID of a job; `python -m jobs list` names them")
    return cluster.get_job_info(job_id)


def log(cluster: Cluster, job_id: str) -> str:
    """Returns a job's log so far."""
    return conceal(cluster.get_job_logs(job_id), _env(details(cluster, job_id)))


def follow(cluster: Cluster, job_id: str, write: Callable[[str], None], tell: Callable[[str], None]) -> JobDetails:
    """Writes a job's log while it grows, until the job has ended; returns its end. Tells what it waits for at first."""
    tell_s = time.monotonic() + TELL_S
    while (info := details(cluster, job_id)).status == JobStatus.PENDING and time.monotonic() < tell_s:
        time.sleep(POLL_S)
    if info.status == JobStatus.PENDING:
        tell(f"{job_id} waits to begin: {reason(info)}")
    env = _env(info)
    unseen = Once(lambda text: write(conceal(text, env)))
    while True:
        try:
            asyncio.run(_tail(cluster, job_id, unseen))
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            # A proxy may pass no WebSockets, and any connection may break; a plain request still brings the log.
            logger.info("the log of %s broke off: %s", job_id, error)
            unseen.begin()
            unseen(cluster.get_job_logs(job_id))
        info = details(cluster, job_id)
        if info.status.is_terminal():
            return info
        time.sleep(POLL_S)


def stop(cluster: Cluster, job_id: str, tell: Callable[[str], None]) -> JobDetails:
    """Stops a job as Ctrl-C would, and waits until it has ended; one that has ended already stays as it is."""
    details(cluster, job_id)
    cluster.stop_job(job_id)
    tell_s = time.monotonic() + TELL_S
    while not (info := details(cluster, job_id)).status.is_terminal():
        if time.monotonic() > tell_s and info.status == JobStatus.PENDING:
            tell(f"{job_id} waits to begin, and ends when it does, or when Ray gives it up: {reason(info)}")
            tell_s = math.inf
        time.sleep(POLL_S)
    return info


def submitted(cluster: Cluster) -> list[JobDetails]:
    """Lists the jobs that were submitted, newest first."""
    mine = [job for job in cluster.list_jobs() if job.submission_id is not None]
    return sorted(mine, key=lambda job: job.start_time or 0, reverse=True)


def reason(info: JobDetails) -> str:
    """Says why a job ended as it did; for a command that failed, with the last lines of its log."""
    return conceal((info.message or "").strip(), _env(info))


def _env(info: JobDetails) -> dict[str, str]:
    return (info.runtime_env or {}).get("env_vars") or {}


class Once:
    """Writes a log each character once, though every connection sends it from the beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.num_written = 0
        self.position = 0

    def begin(self) -> None:
        """Expects the log from its beginning."""
        self.position = 0

    def __call__(self, text: str) -> None:
        """Writes what of the next text is new."""
        fresh = text[max(0, self.num_written - self.position) :]
        self.position += len(text)
        self.num_written = max(self.num_written, self.position)
        if fresh:
            self.write(fresh)


async def _tail(cluster: Cluster, job_id: str, unseen: Once) -> None:
    unseen.begin()
    async for text in cluster.tail_job_logs(job_id):
        unseen(text)


@contextmanager
def _only(address: str) -> Iterator[None]:
    """Makes Ray's client take this address, since it prefers the environment's to its own argument."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _authorization(address: str) -> dict[str, str]:
    """Gives this machine's token to this machine's cluster, as `ray start` does when a token exists.

    Ray's client does so only under RAY_AUTH_MODE=token, and then by itself. No other machine is sent a token unasked.
    """
    if "RAY_AUTH_MODE" in os.environ or not is_this_machine(address):
        return {}
    path = Path(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")))  # noqa: PTH111 - HOME may lack
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _silent(address: str) -> ServiceError:
    return ServiceError(
        f"{hide_password(address)} does not answer; is the cluster running there? start one (`ray start --head`), "
        f"or name another by address=http://HOST:8265 or RAY_API_SERVER_ADDRESS"
    )


def _last_line(text: str) -> str:
    """Takes what matters from a server's traceback or page."""
    return hide_password((text.strip().splitlines() or ["no reason given"])[-1][:200])
