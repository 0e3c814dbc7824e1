"""A run on real Ray Train workers: same numbers as a plain one, mistakes told."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from tiny import PLAIN, Record, local, tiny

from meamtm.distributed import run
from meamtm.distributed.cluster import check_answers, is_of_this_machine
from meamtm.errors import ConfigError, MeamtmError, ServiceError
from meamtm.training.train import train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
WORKERS = {"scale.workers": 2, "data.valid_fold": 2}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of two CPUs on this machine."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_two_workers_give_the_losses_of_a_plain_run(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {**PLAIN, **WORKERS, "optim.lr": 1e-3, "train.epochs": 3}
    plain = tiny(packed, cache_dir, tmp_path / "plain", {**changes, "scale.workers": 0})
    alone, together = Record(), Record()
    train(plain, local(plain, alone))
    outcome = run(tiny(packed, cache_dir, tmp_path / "ray", changes), (together,))
    assert together.column("epoch") == [1, 2, 3]
    assert together.column("train/loss") == pytest.approx(alone.column("train/loss"), abs=1e-5)
    assert together.column("valid/loss") == pytest.approx(alone.column("valid/loss"), abs=1e-4)
    assert outcome.checkpoint.name == "epoch-00003"
    assert outcome.evaluation is not None


def test_a_mistake_that_shows_before_workers_start_is_told_as_it_is(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = tiny(packed, cache_dir, tmp_path, {**WORKERS, "train.batch_size": 1, "scale.max_failures": 0})
    with pytest.raises(ConfigError, match=r"train.batch_size=1 makes batches of 1 clips, fewer than scale.workers=2"):
        run(config)


def test_a_mistake_that_shows_on_a_worker_is_told_as_it_is(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {"optim.name": "sgd", "optim.lr": 10.0, "optim.weight_decay": 1.0, "optim.clip_grad": 0}
    changes |= {**WORKERS, "scale.workers": 1, "scale.max_failures": 0, "train.batch_size": 5, "encoder.depth": 8}
    with pytest.raises(MeamtmError, match=r"^train/loss is (nan|inf) at step \d+ of epoch \d; lower optim\.lr \(10\)"):
        run(tiny(packed, cache_dir, tmp_path, changes))


def test_more_workers_than_the_cluster_has_are_refused(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path, {**WORKERS, "scale.workers": 64})
    with pytest.raises(
        ConfigError, match=r"scale.workers=64 x scale.cpus_per_worker=1 needs 64 CPU, and the cluster has 2"
    ):
        run(config)


MIXED_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
from meamtm.config import RunConfig, ScaleConfig, from_flat
from meamtm.distributed import check_resources, connect, disconnect, make_trainer, needs, room_for
from meamtm.distributed.side_by_side import _share
from meamtm.errors import ConfigError
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
cluster.add_node(num_cpus=3, num_gpus=1)
cluster.add_node(num_cpus=1, num_gpus=2)
connect(cluster.address)
print([room_for(needs(ScaleConfig(device=device))) for device in ("cpu", "cuda")])
shares = ScaleConfig(cpus_per_worker=0.1, gpus_per_worker=0.4)
print(room_for(needs(shares)), make_trainer(RunConfig(scale=shares)).backend_config.backend)
print(make_trainer(RunConfig(scale=ScaleConfig())).backend_config.backend)
config = from_flat({"data.path": sys.argv[1], "scale.cpus_per_worker": 2})
print(_share(dict.fromkeys(range(10), config), config.scale)["num_cpus"])
for num_cpus, device in ((6, "auto"), (4, "cuda"), (4, "cpu")):
    try:
        check_resources(ScaleConfig(cpus_per_worker=num_cpus, device=device))
        print("has room")
    except ConfigError as error:
        print(error)
disconnect()
cluster.shutdown()
"""


def test_what_no_node_has_room_for_is_refused_even_if_all_of_them_together_have(packed: Path) -> None:
    """Ray would wait for such a node for ever; of a GPU two shares of 0.4 have room, and of two GPUs four.

    Of ten runs with two processors each, one at a time has the node with three and a GPU, and all three of them."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-c", MIXED_CLUSTER, packed]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    rule = (
        "a worker is on one node, and the cluster's nodes, of 4 CPU, 2 GPU at most, have room for 0; lower one of them"
    )
    assert said == [
        "[8, 2]",
        "6 gloo",
        "nccl",
        "3",
        *(f"scale.workers=1 x scale.cpus_per_worker={cpus} and scale.gpus_per_worker=1: {rule}" for cpus in (6, 4)),
        "has room",
    ]


def test_an_address_that_does_not_answer_is_named() -> None:
    with pytest.raises(ServiceError, match=r"^scale\.address=127\.0\.0\.1:9: no Ray cluster answers there"):
        check_answers("127.0.0.1:9")


def test_a_dashboards_address_is_no_clusters() -> None:
    with pytest.raises(ConfigError, match=r"scale\.address=http://127\.0\.0\.1:8265 is a dashboard's, .*HOST:6379"):
        check_answers("http://127.0.0.1:8265")


STARTS = """
import os, signal, threading
from ray._private import worker
from meamtm.distributed import connect, disconnect
heard = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: heard.append(number))
stop = threading.Event()
def send():
    while not stop.wait(0.05) and worker._global_node is None:  # until its processes are there
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
sender = threading.Thread(target=send)
sender.start()
connect(None)
stop.set()
sender.join()
print(sorted(set(heard)), len(heard) > 20)
disconnect()
"""


def test_signals_are_heard_while_ray_starts() -> None:
    """Ray's own handler of SIGTERM would end the process without a word."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", STARTS], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[2, 15] True\n"), done.stderr


OUR_CLUSTER = """
import os, signal
import psutil, ray
from ray.cluster_utils import Cluster
from meamtm.distributed import connect, connected_for_now
me = psutil.Process()
somebodys = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
theirs = me.children(recursive=True)
signal.signal(signal.SIGTERM, lambda *_: print("hears SIGTERM", flush=True))
with connected_for_now():
    connect(None)
    with connected_for_now():
        connect(None)
    print("still", ray.is_initialized())
    print("clusters", somebodys.address, ray.get_runtime_context().gcs_address)
    theirs += [below for each in theirs for below in each.children(recursive=True)]
    for process in {me, *me.children(recursive=True)} - {*theirs}:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                print("listens", connection.laddr.ip)
    os.kill(os.getpid(), signal.SIGTERM)
print("now", ray.is_initialized())
os.kill(os.getpid(), signal.SIGTERM)
somebodys.shutdown()
"""


@pytest.fixture(scope="module")
def beside_another() -> list[str]:
    """What a process of its own says of a cluster of ours, beside one that somebody has started here."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-c", OUR_CLUSTER]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_run_without_an_address_does_not_join_what_somebody_has_started_here(beside_another: list[str]) -> None:
    """Ray would, and wait for a minute when they stop it. A study's last run leaves its cluster: the next may need one
    of its own, with a dashboard."""
    assert {"still True", "now False"} <= {*beside_another}
    (addresses,) = (line for line in beside_another if line.startswith("clusters "))
    _, somebodys, ours = addresses.split()
    assert somebodys != ours


def test_a_cluster_of_ours_listens_to_this_machine_alone_and_leaves_signals_to_us(beside_another: list[str]) -> None:
    addresses = [line.split()[1] for line in beside_another if line.startswith("listens")]
    assert len(addresses) > 5
    assert all(ip_address(address.removeprefix("::ffff:")).is_loopback for address in addresses), addresses
    assert beside_another.count("hears SIGTERM") == 2


SOMEBODYS = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""
JOINS = """
import sys
from meamtm.distributed import connect
from meamtm.errors import ServiceError
try:
    connect(sys.argv[1])
    print("joined")
except ServiceError as error:
    print(error)
"""


@pytest.mark.ray
def test_a_cluster_on_this_machine_is_sent_the_token_that_it_asks_for(tmp_path: Path) -> None:
    """As `ray start` asks for one where one has been made; Ray's drivers keep it from an address that is named."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with_token = environment | {"HOME": str(tmp_path)}

    def joins(address: str, env: dict[str, str]) -> str:
        command = [sys.executable, "-c", JOINS, address]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.strip()

    command = [sys.executable, "-c", SOMEBODYS]
    with subprocess.Popen(
        command, env=with_token | {"RAY_AUTH_MODE": "token"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as somebodys:
        try:
            assert somebodys.stdout is not None
            address = somebodys.stdout.readline().strip()
            assert joins(address, with_token) == "joined"
            assert joins(address, environment | {"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}) == (
                f"scale.address={address}: no token found here; where the cluster asks for a token, set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (or keep the token in ~/.ray/auth_token)"
            )
        finally:
            somebodys.communicate("\n")


def test_the_token_is_sent_to_this_machine_alone() -> None:
    assert all(is_of_this_machine(host) for host in ("localhost", "127.0.0.1", "::1"))
    assert not any(is_of_this_machine(host) for host in ("198.51.100.7", "no-such-host.invalid", ""))
