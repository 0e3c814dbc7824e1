"""An encoder that guesses hidden patches learns from clips alone, and then labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PLAIN, Record, local, tiny
from torch import Tensor

from meamtm.config import EncoderConfig, override, run_folder
from meamtm.errors import MeamtmError
from meamtm.model.encoder import Encoder
from meamtm.model.masked import MaskedPrediction
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import is_trained, load_model, newest
from meamtm.training.context import Stopped
from meamtm.training.run import run_here
from meamtm.training.train import train

SIZE = (32, 50)
STEMS: dict[str, dict[str, Any]] = {
    "conv": {"stem_channels": [8, 8, 8]},
    "patch": {"stem": "patch", "patch": [8, 10], "stride": [8, 10]},
    "overlapping": {"stem": "patch", "patch": [8, 10], "stride": [6, 5]},
    "shifted": {"stem": "shifted_patch", "patch": [8, 10], "stride": [8, 10]},
}


def masked(hidden: float = 0.5, **changes: Any) -> MaskedPrediction:
    torch.manual_seed(0)
    config = EncoderConfig.model_validate({"heads": 2, "head_dim": 8, "depth": 1, "drop_path": 0, **changes})
    return MaskedPrediction(Encoder(config, SIZE, 3), hidden)


def image() -> Tensor:
    return torch.randn(4, 1, *SIZE, generator=torch.Generator().manual_seed(1)) + 5  # so that nothing seen is 0


def errors_and_seen(model: MaskedPrediction, of: Tensor) -> tuple[Tensor, Tensor]:
    """Errors by the same draw each time, and what the encoder was shown."""
    seen: list[Tensor] = []
    with model.encoder.patch_embed.register_forward_pre_hook(lambda _, images: seen.append(images[0])):
        torch.manual_seed(7)
        errors = model(of)
    return errors, seen[0]


@pytest.mark.parametrize("pool", ["mean", "cls_dist", "attention"])
@pytest.mark.parametrize("stem", STEMS)
def test_hidden_cells_are_not_seen_and_they_alone_are_guessed(stem: str, pool: str) -> None:
    model = masked(pool=pool, **STEMS[stem]).eval()
    errors, seen = errors_and_seen(model, image())
    patch_size, stride, num_patches = model.patch_size, model.stride, model.encoder.patch_embed.num_patches
    dark = F.unfold((seen == 0).float(), patch_size, stride=stride).mean(1) == 1  # (batch, patch)
    assert torch.equal(seen[seen != 0], image()[seen != 0])
    if stem != "overlapping":  # there, hidden neighbours may cover a patch that is not hidden itself
        assert dark.sum(1).tolist() == [num_patches // 2] * 4
        tokens, _ = model.encoder.tokens(seen)
        guess = model.decoder(tokens[:, model.encoder.num_prefix_tokens :])
        truth = F.unfold(image(), patch_size, stride=stride).transpose(1, 2)
        expected = torch.stack([F.mse_loss(*(each[row][dark[row]] for each in (guess, truth))) for row in range(4)])
        torch.testing.assert_close(errors, expected)
    changed, still_seen = errors_and_seen(model, torch.where(seen == 0, image() + 100, image()))
    assert torch.equal(still_seen, seen)
    assert (changed > errors + 100).all()


def test_each_clip_hides_other_patches_and_at_least_one() -> None:
    model = masked(1e-6, **STEMS["patch"])
    _, seen = errors_and_seen(model, image())
    hidden = (seen == 0).flatten(1)
    assert hidden.sum(1).tolist() == [80] * 4
    assert len({tuple(row) for row in hidden.tolist()}) > 1


def test_no_patch_is_left_out_while_each_is_guessed(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {"encoder.patchout": 0.5, "pretrain.epochs": 1, "train.epochs": 1, "train.ema_decay": 0}
    config, seen = tiny(packed, cache_dir, tmp_path, changes), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out.shape[1]) if type(module).__name__ == "Patchout" else None
    )
    with handle:
        train(config, local(config))
    num_patches = 4 * 6
    num_batches = 4
    assert seen[:num_batches] == [num_patches] * num_batches
    assert set(seen[num_batches:]) >= {num_patches // 2}


def test_a_run_guesses_first_and_learns_labels_then(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {**PLAIN, "pretrain.epochs": 6, "train.epochs": 3, "data.valid_fold": 2, "optim.schedule": "cosine"}
    config, record = tiny(packed, cache_dir, tmp_path, changes), Record()
    outcome = run_here(config, (record,))
    rows = record.rows
    assert [row["step"] for row in rows] == list(range(1, 10))
    guessing, learning = rows[:6], rows[6:]
    assert all("pretrain/loss" in row and not {"train/loss", "valid/loss"} & row.keys() for row in guessing)
    assert all("train/loss" in row and "valid/loss" in row and "pretrain/loss" not in row for row in learning)
    assert guessing[-1]["pretrain/loss"] < guessing[0]["pretrain/loss"]
    assert guessing[-1]["train/lr"] < 0.3 * guessing[0]["train/lr"], "its schedule ends with it"
    assert learning[0]["train/lr"] > 3 * guessing[-1]["train/lr"], "and another one begins"
    assert is_trained(outcome.checkpoint)
    assert outcome.checkpoint.name == "epoch-00009"
    assert run_here(config).was_done
    alone = run_here(override(config, {"pretrain.epochs": 0}))
    assert alone.folder != outcome.folder
    assert alone.metrics["train/loss"] != outcome.metrics["train/loss"]


def test_labels_are_learnt_with_the_encoder_that_guessed(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """At the turn the encoder is what it was, the head a new one, and the optimizer knows no earlier step."""
    changes = {"pretrain.epochs": 2, "train.epochs": 1}
    before, after = (tiny(packed, cache_dir, tmp_path / kind, changes) for kind in ("before", "after"))
    for config, num_steps in ((before, 8), (after, 9)):  # four steps an epoch: the last that guesses, the next one
        steps = iter(range(1, 100))
        with pytest.raises(Stopped):
            train(config, local(config, should_stop=lambda steps=steps, last=num_steps: next(steps) >= last))
    first, second = (load_model(newest(run_folder(config))).model.encoder for config in (before, after))
    torch.manual_seed(before.train.seed)
    new = AudioTransformer(before, 10).encoder
    assert torch.equal(first.head.weight, new.head.weight), "no label has been heard of"
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, new.blocks[0].mlp.fc1.weight)
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0, msg=name)  # one step of a rate that begins low
    assert any(not torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_a_loss_that_is_not_finite_is_called_what_it_is(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    wild = {"optim.lr": 10, "optim.name": "sgd", "optim.clip_grad": 0, "optim.schedule": "constant", "optim.warmup": 0}
    message = r"^pretrain/loss is (nan|inf) at step \d+ of epoch \d; lower optim\.lr \(10\)"
    with pytest.raises(MeamtmError, match=message):
        run_here(tiny(packed, cache_dir, tmp_path, {"pretrain.epochs": 3, **wild}))
