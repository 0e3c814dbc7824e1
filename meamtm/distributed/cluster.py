"""The Ray cluster that runs live on: one that is there, or one of this machine's own."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import current_thread, main_thread
from urllib.parse import SplitResult, urlsplit

from meamtm.config import JOB_HOLDS, ScaleConfig
from meamtm.errors import ConfigError, ServiceError
from meamtm.tracking import hide_password

CONNECT_S = 10.0
REMEDY = (
    "where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (or keep the token in "
    "~/.ray/auth_token)"
)
SPIN = "GOMP_SPINCOUNT"
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray's 2 s would be longer than a small epoch
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; silences its warning
    "RAY_USAGE_STATS_ENABLED": "0",
    SPIN: "10000",  # as in screen.run_commands
}


def spin_count() -> dict[str, str]:
    """Tells other processes how long OpenMP's threads wait awake: what this one was told, or what the commands say."""
    return {SPIN: os.environ.get(SPIN, ENVIRONMENT[SPIN])}


def connect(address: str | None = None, *, dashboard: bool = False) -> None:
    """Joins the Ray cluster at `scale.address` or RAY_ADDRESS, or starts one on this machine; once per process."""
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        return
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = named_address(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address not in (None, "auto", "local"):  # the two are Ray's own words
        check_answers(address)
        _offer_token(address)
    try:
        if address:
            with _deaf_to_sigterm():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine's nodes away
            with _on_loopback(), _deaf_to_sigterm():
                # Without "local" Ray would join what somebody has started here, and lose it when they stop it.
                ray.init(address="local", include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise ServiceError(
            f"scale.address={hide_password(address or 'null')}: no token found here; {REMEDY}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if address is None:
            raise ServiceError(
                f"Ray does not start on this machine ({_first_line(error)}); /tmp/ray/session_latest/logs tells more, "
                f"and a single run with scale.workers=0 needs no Ray"
            ) from error
        raise ServiceError(
            f"scale.address={hide_password(address)}: Ray does not answer ({_first_line(error)}); {REMEDY}; start a "
            f"cluster with `ray start --head`, or leave scale.address and RAY_ADDRESS unset for one on this machine"
        ) from error
    for number, handler in handlers.items():  # Ray has put its own in the place of ours
        if callable(handler) and current_thread() is main_thread():
            signal.signal(number, handler)


def named_address(address: str | None) -> str | None:
    """Names the cluster that is wanted: `scale.address`, or RAY_ADDRESS, which every job has; None for this machine."""
    return address or os.environ.get("RAY_ADDRESS") or None


def disconnect() -> None:
    """Leaves the cluster, and ends it if this process started it.

    Ray then takes SIGTERM's handler away where Python does not see it; the process would die of the next one at once.
    """
    import ray

    ray.shutdown()
    if callable(handler := signal.getsignal(signal.SIGTERM)) and current_thread() is main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Has a cluster that starts meanwhile listen to this machine alone, as Ray's own do on macOS and Windows; on Linux
    Ray would listen to everybody."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Has Ray leave SIGTERM to whoever hears it while it starts; its own handler ends the process without a word."""
    from ray._private import utils

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


@contextmanager
def connected_for_now() -> Iterator[None]:
    """Leaves the cluster at the end if it was joined meanwhile; does not load Ray."""

    def is_connected() -> bool:
        return (ray := sys.modules.get("ray")) is not None and ray.is_initialized()

    before = is_connected()
    try:
        yield
    finally:
        if is_connected() and not before:
            disconnect()


def nodes() -> list[dict[str, float]]:
    """Gives what each node has, less what this job's own process holds of its node as long as it lasts."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            held = {kind: os.environ.get(name, "0") for kind, name in JOB_HOLDS.items() if node["NodeID"] == here}
            found.append({kind: has - float(held.get(kind, 0)) for kind, has in node["Resources"].items()})
    return found


def most_here(wanted: Mapping[str, float]) -> int:
    """Counts how many processes have room on this one's node, which is one of them."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (there,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return max(1, _room_on(there, wanted))


def needs(scale: ScaleConfig) -> dict[str, float]:
    """Gives what a worker, or a trial or run without any, takes of one node."""
    return {"CPU": scale.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if uses_gpu(scale) else {})}


def room_for(wanted: Mapping[str, float]) -> int:
    """Counts how many processes have room, each of them on one node."""
    return sum(_room_on(node, wanted) for node in nodes())


def room_with_memory(wanted: Mapping[str, float], num_bytes: float) -> int:
    """Counts the same where each takes so much memory, of what was free when its node started; a node that has room for
    the rest takes one whatever that needs."""
    return sum(
        min(room, max(1, int(node.get("memory", 0) // num_bytes)))
        for node in nodes()
        if (room := _room_on(node, wanted)) > 0
    )


def _room_on(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    return min(shares(kind, node.get(kind, 0), amount) for kind, amount in wanted.items())


def shares(kind: str, has: float, amount: float) -> int:
    """Counts shares of what a node has; one of a GPU lies within one GPU."""
    whole, rest = divmod(has, 1) if kind == "GPU" else (0, has)
    return int(whole) * int(1 / amount + 1e-6) + int(rest / amount + 1e-6)


def check_resources(scale: ScaleConfig) -> None:
    """Refuses to wait forever for CPUs or GPUs that the cluster does not have, or not on one node."""
    wanted, there, num_workers = needs(scale), nodes(), max(1, scale.least_workers)
    for kind, per_worker in wanted.items():
        has, needed = sum(node.get(kind, 0) for node in there), num_workers * per_worker
        if needed > has:
            raise ConfigError(
                f"scale.workers={num_workers} x scale.{kind.lower()}s_per_worker={per_worker:g} needs {needed:g} "
                f"{kind}, and the cluster has {has:g}; lower one of them"
            )
    if (room := room_for(wanted)) < num_workers:
        each = " and ".join(f"scale.{kind.lower()}s_per_worker={amount:g}" for kind, amount in wanted.items())
        most = ", ".join(f"{max(node.get(kind, 0) for node in there):g} {kind}" for kind in wanted)
        raise ConfigError(
            f"scale.workers={num_workers} x {each}: a worker is on one node, and the cluster's nodes, of {most} at "
            f"most, have room for {room}; lower one of them"
        )


def uses_gpu(scale: ScaleConfig) -> bool:
    """Tells whether workers get GPUs: where asked for, or where the cluster has some and nothing forbids it."""
    import ray

    if scale.device == "auto":
        return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    return scale.device == "cuda"


def _offer_token(address: str) -> None:
    """Has Ray send this machine's token, where there is one, to a cluster on this machine, which may ask for it.

    `ray start` asks for it by itself; Ray's drivers send it to no address that is named, unless RAY_AUTH_MODE=token.
    No other machine is sent a token unasked.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    if is_of_this_machine(_parts(address).hostname or ""):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def is_of_this_machine(host: str) -> bool:
    """Tells whether one can listen at an address, which only its own machine can."""
    try:
        family, *_, (ip, *_) = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as own:
            own.bind((ip, 0))
    except OSError:
        return False
    return True


def check_answers(address: str) -> None:
    """Knocks at HOST:PORT or ray://HOST:PORT."""
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"scale.address={hide_password(address)} is a dashboard's, which takes jobs; name the cluster itself, "
            f"HOST:6379, or submit a job (`python -m jobs submit`)"
        )
    try:
        parts = _parts(address)
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=CONNECT_S):
            return
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"scale.address={hide_password(address)}: no Ray cluster answers there ({error}); check host and port, "
            f"start one with `ray start --head`, or leave scale.address and RAY_ADDRESS unset for one on this machine"
        ) from error


def _parts(address: str) -> SplitResult:
    return urlsplit(address if "://" in address else f"ray://{address}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
