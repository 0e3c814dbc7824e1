"""Two gloo ranks with half the batch each take the same steps as one process."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import PLAIN, Record, local, tiny
from torch import multiprocessing

from meamtm.config import RunConfig, flatten, from_flat
from meamtm.model.precision import is_bf16
from meamtm.model.transformer import AudioTransformer
from meamtm.training.prepare import TrainingBatch
from meamtm.training.run import run_here
from meamtm.training.step import make_learner, train_step
from meamtm.training.train import train

MODELS = {
    "conv": {"encoder.stem_activation": "silu", "optim.name": "muon"},
    "conv-relu": {"optim.lr": 1e-4},
    "patch": {"encoder.stem": "patch", "encoder.patch": [8, 6], "encoder.stride": [8, 3]},
    "cnn": {"encoder.cnn": "test_efficientnet", "optim.name": "muon"},
}
"""Smooth stems agree to 1e-6. A last digit decides now and then on which side of ReLU's kink a cell lies, whose part in
a gradient is a thousandth; at a rate of 1e-3 that moves a loss by 5e-6 each time."""
TOLERANCE = {"conv": 1e-6, "conv-relu": 1e-5, "patch": 1e-6, "cnn": 1e-6}
OF_TWO_RANKS = {"patch": {"train.accumulation_steps": 4}}
"""Thirty clips of each rank, in parts of seven and eight."""


def _join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)


def _rank(rank: int, port: int, flat: dict, out: str) -> None:
    _join(rank, port)
    config, record = from_flat(flat), Record()
    context = local(config, record)
    context.rank, context.world_size = rank, 2
    if rank == 1:
        context.report = lambda *_: None
    train(config, context)
    dist.destroy_process_group()
    if rank == 0:
        torch.save(record.rows, out)


def _two_ranks(config: RunConfig, out: Path) -> list[dict[str, float]]:
    _start(_rank, _free_port(), flatten(config), str(out))
    return torch.load(out)


def _start(rank: Callable[..., None], *args: object) -> None:
    """Two processes of their own, forked where all is imported (tests/conftest.py)."""
    multiprocessing.start_processes(rank, args, nprocs=2, start_method="forkserver")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_give_the_first_20_losses_of_one_process(
    packed: Path, cache_dir: Path, tmp_path: Path, model: str
) -> None:
    """All 60 training clips make one batch, so that an epoch is a step."""
    changes = {**PLAIN, "data.valid_fold": 2, "optim.lr": 1e-3, **MODELS[model]}
    changes |= {"train.batch_size": 60, "train.epochs": 20, "train.checkpoint_s": 1e6}
    one = tiny(packed, cache_dir, tmp_path / "one", changes)
    two = tiny(packed, cache_dir, tmp_path / "two", changes | OF_TWO_RANKS.get(model, {}))
    record = Record()
    train(one, local(one, record))
    rows = _two_ranks(two, tmp_path / "rows.pt")
    assert len(rows) == 20
    losses = [row["train/loss"] for row in rows]
    assert losses == pytest.approx(record.column("train/loss"), abs=TOLERANCE[model])
    assert losses[-1] < losses[0], "nothing was learned, so equal losses say nothing"
    assert [row["valid/loss"] for row in rows] == pytest.approx(record.column("valid/loss"), abs=1e-4)


def test_two_ranks_pre_train_as_one_process(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """All patches are hidden, since each rank draws its own; and then the run learns labels."""
    changes = {**PLAIN, "pretrain.epochs": 10, "pretrain.hidden": 0.99, "optim.lr": 1e-3, **MODELS["patch"]}
    changes |= {"train.batch_size": 60, "train.epochs": 5, "train.checkpoint_s": 1e6, "data.valid_fold": 2}
    one, two = (tiny(packed, cache_dir, tmp_path / kind, changes) for kind in ("one", "two"))
    record = Record()
    train(one, local(one, record))
    rows = _two_ranks(two, tmp_path / "rows.pt")
    for key, among in (("pretrain/loss", slice(10)), ("train/loss", slice(10, 15))):
        expected = [row[key] for row in record.rows[among]]
        assert [row[key] for row in rows[among]] == pytest.approx(expected, abs=TOLERANCE["patch"])
        assert expected[-1] < expected[0], "nothing was learned, so equal losses say nothing"


def _rank_that_finds_fewer(rank: int, port: int, flat: dict, out: str) -> None:
    """As where a teacher ends after one rank has looked, and before another one does."""
    _rank(
        rank, port, flat | ({"distill.teacher": flat["distill.teacher"].replace("*", "-0*")} if rank == 1 else {}), out
    )


def test_two_ranks_learn_from_the_teachers_that_the_first_one_finds(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    for seed in (0, 1):
        teacher = tiny(
            packed, cache_dir, tmp_path / "all", {"data.valid_fold": 2, "train.seed": seed, "optim.lr": 1e-2}
        )
        run_here(teacher).folder.rename(tmp_path / f"teacher-{seed}")
    changes = {**PLAIN, "data.valid_fold": 2, "optim.lr": 1e-3, **MODELS["conv"], "train.batch_size": 60}
    changes |= {"train.epochs": 5, "train.checkpoint_s": 1e6, "distill.ensemble": True}
    changes |= {"distill.teacher": str(tmp_path / "teacher*"), "distill.weight": 1.0}
    one, two = (tiny(packed, cache_dir, tmp_path / kind, changes) for kind in ("one", "two"))
    record = Record()
    train(one, local(one, record))
    _start(_rank_that_finds_fewer, _free_port(), flatten(two), str(tmp_path / "rows.pt"))
    losses = [row["train/loss"] for row in torch.load(tmp_path / "rows.pt")]
    assert losses == pytest.approx(record.column("train/loss"), abs=TOLERANCE["conv"])
    fewer = Record()
    alone = tiny(packed, cache_dir, tmp_path / "alone", changes | {"distill.teacher": str(tmp_path / "teacher-0")})
    train(alone, local(alone, fewer))
    assert fewer.column("train/loss") != pytest.approx(losses, abs=1e-3), "one teacher says what two say"


def _rank_of_its_own_kind(rank: int, port: int, flat: dict, out: str) -> None:
    """As on two machines, of which one has bf16."""
    _join(rank, port)
    torch.cpu._is_avx512_bf16_supported = lambda: rank == 0
    config = from_flat(flat)
    assert is_bf16(config, torch.device("cpu")) == (rank == 0)
    torch.manual_seed(0)
    model = AudioTransformer(config, 4)
    learner = make_learner(config, model, torch.device("cpu"), 10, multi_label=False, rank=rank, world_size=2)
    waveform = torch.randn(4, config.clip_samples, generator=torch.Generator().manual_seed(rank))
    for step in range(3):
        train_step(learner, TrainingBatch(waveform, torch.eye(4), None, 8, step))
    torch.save(model.state_dict(), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_of_which_one_has_bf16_keep_the_same_weights(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {"optim.name": "muon", "train.precision": "auto", "train.batch_size": 8, "encoder.drop_path": 0.0}
    flat = flatten(tiny(packed, cache_dir, tmp_path, changes))
    _start(_rank_of_its_own_kind, _free_port(), flat, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, weight in first.items():
        assert torch.equal(weight, second[key]), key
