"""Tiny real data that many tests share: built once per session, never changed by a test."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from meamtm.config import DataConfig
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.pack import pack
from meamtm.data.synth import write_synth
from meamtm.tracking.server import connect

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and rich would not look again
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 they get nothing while tests beside them compute
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that tests in the background has it ignored by all
torch.set_num_threads(1)
# where ten seconds of imports are paid once, for processes that are forked from there
multiprocessing.set_forkserver_preload(
    ["meamtm.training.train", "meamtm.tracking", "mlflow.store.tracking.sqlalchemy_store"]
)
settings.register_profile("meamtm", deadline=None)  # a busy machine is no failure
settings.load_profile("meamtm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files that take minutes first, so that both processes end at once."""
    slow = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in sound set, small: 10 classes of 10 clips of 0.5 s at 8 kHz."""
    folder = tmp_path_factory.mktemp("sounds") / "synth"
    write_synth(folder, clips_per_class=10, clip_s=0.5, sample_rate_hz=8_000)
    return folder


@pytest.fixture(scope="session")
def packed(sounds: Path) -> Path:
    """The small sound set, packed."""
    out = sounds.parent / "packed"
    pack(sounds, out)
    return out


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session keeps decoded waveforms."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def clips(packed: Path, cache_dir: Path) -> Clips:
    """The small sound set, opened at 8 kHz."""
    return open_clips(DataConfig(path=str(packed), cache_dir=str(cache_dir)), 8_000)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store that MLflow has migrated, to be copied: migrating takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "template.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def esc10() -> Path:
    """The folder of ESC-10's audio and CSV, where there is one."""
    folder = os.environ.get("MEAMTM_ESC10")
    if not folder:
        pytest.skip("MEAMTM_ESC10 does not name a folder with esc10.csv and audio/")
    return Path(folder)
