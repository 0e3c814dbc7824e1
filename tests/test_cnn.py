"""A convolutional network of timm's takes the transformer's place, and teaches."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny import tiny
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from meamtm.config import EncoderConfig, flatten, from_flat, write_yaml
from meamtm.errors import ConfigError
from meamtm.model.batch_norm import SharedBatchNorm2d, share_batch_norms
from meamtm.model.cnn import ConvNet
from meamtm.model.cost import cost
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import load_model
from meamtm.training.memory import peak_training_bytes
from meamtm.training.optim import make_optimizer
from meamtm.training.run import run_here

SIZE = (32, 48)


def network(name: str = "test_resnet", **changes: Any) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(EncoderConfig.model_validate({"cnn": name, **changes}), SIZE, 5).eval()


def image(num_frames: int = SIZE[1]) -> Tensor:
    return torch.randn(3, 1, SIZE[0], num_frames, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "resnetv2_18", "tiny_vit_5m_224"]
)
@torch.no_grad()
def test_logits_are_those_of_timms_network_for_any_length(name: str) -> None:
    made = network(name, drop_path=0)
    plain = timm.create_model(name, in_chans=1, num_classes=5).eval()
    for weight in made.parameters():  # some layers begin as if they were not there
        torch.nn.init.normal_(weight, std=0.1)
    state = zip(plain.state_dict(), made.network.state_dict().values(), strict=True)
    plain.load_state_dict(dict(state))
    for num_frames in (SIZE[1], 64, 200):
        torch.testing.assert_close(made(image(num_frames)), plain(image(num_frames)))
        assert made.embed(image(num_frames)).ndim == 2


def test_a_strided_convolution_of_the_one_channel_learns(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """torch 2.14 corrupts its heap there if the image has its channel last, and the process dies."""
    changes = {"encoder.cnn": "mobileone_s0", "encoder.drop_path": 0.0, "mel.num_bands": 64, "train.epochs": 1}
    write_yaml(tmp_path / "run.yaml", flatten(tiny(packed, cache_dir, tmp_path, changes)))
    command = [sys.executable, "-m", "meamtm.cli", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "regnetx_002"])
@pytest.mark.parametrize("in_training", [True, False])
@torch.no_grad()
def test_shared_batch_norms_compute_what_those_of_the_network_did(name: str, in_training: bool) -> None:
    """Those with an activation too; and none is left that each rank would keep for itself."""
    made, plain = (timm.create_model(name, in_chans=1, num_classes=5).train(in_training) for _ in range(2))
    made.load_state_dict(plain.state_dict())
    for _ in range(2):  # so that running statistics are no longer those of a new network
        (
            made(
                image(),
            ),
            plain(image()),
        )
    made = share_batch_norms(made)
    torch.testing.assert_close(made(image()), plain(image()))
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, SharedBatchNorm2d) for norm in norms)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10", r"^encoder\.cnn=resnet10: timm has no such network; did you mean resnet1\w+\?$"),
        ("?", r"^encoder\.cnn=\?: timm has no such network; timm\.list_models\('\*net\*'\) lists some$"),
        ("resnet10t.c3_in1k", r"^encoder\.cnn=resnet10t\.c3_in1k: names published weights, and .*; write resnet10t$"),
        ("vgg11_bn", r"^encoder\.cnn=vgg11_bn: cannot be built so \(.*drop_path.*\); set encoder\.drop_path=0, or"),
        ("eva02_tiny_patch14_224", r"^encoder\.cnn=eva02_.*: takes no spectrogram of 32 x 48 \(.*\); take a conv"),
        (
            "bat_resnext26ts",
            r"takes no spectrogram of 32 x 48 \(\w+\); take .* or raise mel\.num_bands or data\.clip_s$",
        ),
        ("test_vit", r"^encoder\.cnn=test_vit: gives no map \(batch, channel, row, column\), one vector .*; take"),
        (
            "nextvit_small",
            r"^encoder\.cnn=nextvit_small: has a BatchNorm1d, whose statistics several workers would not",
        ),
    ],
)
def test_a_network_that_hears_no_spectrogram_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        network(name)


def test_a_convolutional_network_needs_no_size_of_patches() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.stem_channels needs at least"):
        from_flat({"mel.num_bands": 12})
    assert cost(from_flat({"mel.num_bands": 12, "encoder.cnn": "test_resnet"})).num_tokens == 0


def test_clips_of_one_batch_are_equally_long() -> None:
    model = AudioTransformer(from_flat({"encoder.cnn": "test_resnet"}), 5).eval()
    with pytest.raises(ValueError, match="leave `num_samples` out"):
        model(torch.zeros(1, 32_000), None, torch.tensor([16_000]))


def test_dropout_and_stochastic_depth_are_the_networks() -> None:
    made = network("test_convnext", dropout=0.3, drop_path=0.2)
    assert made.network.drop_rate == 0.3
    rates = [module.drop_prob for module in made.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)  # type: ignore[reportArgumentType]


def test_what_keeps_its_size_is_told_by_the_network() -> None:
    config = from_flat({"encoder.cnn": "tiny_vit_5m_224", "encoder.drop_path": 0.0, "optim.name": "adamw"})
    model = AudioTransformer(config, 5)
    lasting = model.encoder.no_weight_decay()
    assert lasting
    assert lasting <= {name for name, weight in model.encoder.named_parameters() if weight.ndim > 1}
    decay = {
        weight: group["weight_decay"]
        for group in make_optimizer(model, config).param_groups
        for weight in group["params"]
    }
    assert {decay[weight] for name, weight in model.encoder.named_parameters() if name in lasting} == {0.0}


def test_cost_is_counted_and_memory_foretold() -> None:
    config = from_flat({"encoder.cnn": "resnet10t", "train.batch_size": 16})
    resnet = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    found = cost(config)
    assert found.num_params == sum(weight.numel() for weight in resnet.parameters())
    assert peak_training_bytes(config) > 4 * 4 * found.num_params
    assert peak_training_bytes(config) > peak_training_bytes(
        from_flat({"encoder.cnn": "resnet10t", "train.batch_size": 8})
    )


def test_no_part_of_a_batch_is_one_clip(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """An epoch's batches are nearly equal, so 100 clips in batches of 8 are some of 7, of which 4 parts hear one."""
    changes = {"encoder.cnn": "resnet10t", "train.batch_size": 8, "train.accumulation_steps": 5, "train.epochs": 1}
    heard = []

    def hear(module: nn.Module, images: tuple[Tensor]) -> None:
        if isinstance(module, ConvNet) and module.training and type(images[0]) is Tensor:  # no fake one of an estimate
            heard.append(len(images[0]))

    with register_module_forward_pre_hook(hear):
        run_here(tiny(packed, cache_dir, tmp_path, changes | {"data.test_fold": None}))
    assert sum(heard) == 100
    assert set(heard) == {2, 3}


def test_a_convolutional_network_teaches(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Trained, tested, read back, and asked by a transformer that learns from it."""
    teacher = {"name": "teacher", "encoder.cnn": "test_efficientnet", "encoder.drop_path": 0.0, "optim.name": "muon"}
    outcome = run_here(tiny(packed, cache_dir, tmp_path, teacher))
    saved = load_model(outcome.checkpoint)
    assert isinstance(saved.model.encoder, ConvNet)
    assert outcome.evaluation is not None
    pupil = tiny(packed, cache_dir, tmp_path, {"name": "pupil", "distill.teacher": str(tmp_path / "teacher-*")})
    taught, alone = run_here(pupil), run_here(tiny(packed, cache_dir, tmp_path, {"name": "alone"}))
    assert taught.metrics["train/loss"] != alone.metrics["train/loss"]
