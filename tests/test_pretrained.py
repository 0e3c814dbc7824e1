"""Published weights give the same logits here as where they come from, and a report tells what became of each."""

import logging
import math
import pickle
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import PLAIN, local, tiny
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification, ASTModel

from meamtm.config import EncoderConfig, OptimConfig, from_flat, parse_changes, run_folder
from meamtm.errors import CheckpointError, ConfigError
from meamtm.model.encoder import Encoder
from meamtm.model.pretrained import Borrowed, borrow, fit_positions
from meamtm.training.checkpoint import load_model, load_state, newest
from meamtm.training.context import Stopped
from meamtm.training.run import absolute, run_here
from meamtm.training.train import train

AST = {"stem": "patch", "stride": [10, 10], "pool": "cls_dist", "heads": 2, "head_dim": 8, "depth": 2, "mlp_ratio": 4.0}
"""AST, but narrow and flat."""
DEIT = AST | {"heads": 3, "head_dim": 64, "depth": 12}
"""DeiT-Ti with AST's patches."""
DISTILLED = "deit_tiny_distilled_patch16_224"
NUM_LABELS = 7


def randomised(model: nn.Module) -> nn.Module:
    """Draws weights under which activations are about as large as in a trained network, and everything matters."""
    random = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=random)
        if "norm" in name:
            drawn = drawn / 10 + name.endswith("weight")
        elif re.search("token|pos", name):
            drawn = drawn / 2
        else:
            drawn = drawn / (math.sqrt(weight[0].numel()) if weight.ndim > 1 else 10)
        weight.data.copy_(drawn)
    return model.eval()


def reference(**changes: Any) -> ASTForAudioClassification:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    frames = {"num_mel_bins": 128, "max_length": 64, "num_labels": NUM_LABELS}
    return randomised(ASTForAudioClassification(ASTConfig(**(size | frames | changes))))  # type: ignore[return-value]


def authors_names(model: ASTForAudioClassification) -> dict[str, Tensor]:
    """AST as its authors save it, with the head for images that they leave in."""
    theirs, blocks = model.state_dict(), {}
    pairs = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for number in range(model.config.num_hidden_layers):
        old, new = f"audio_spectrogram_transformer.layers.{number}", f"module.v.blocks.{number}"
        for kind in ("weight", "bias"):
            blocks |= {f"{new}.{b}.{kind}": theirs[f"{old}.{a}.{kind}"] for a, b in pairs.items()}
            qkv = [theirs[f"{old}.attention.{part}_proj.{kind}"] for part in "qkv"]
            blocks[f"{new}.attn.qkv.{kind}"] = torch.cat(qkv)
    embeddings = "audio_spectrogram_transformer.embeddings"
    width = model.config.hidden_size
    return {
        "module.v.cls_token": theirs[f"{embeddings}.cls_token"],
        "module.v.dist_token": theirs[f"{embeddings}.distillation_token"],
        "module.v.pos_embed": theirs[f"{embeddings}.position_embeddings"],
        "module.v.patch_embed.proj.weight": theirs[f"{embeddings}.patch_embeddings.projection.weight"],
        "module.v.patch_embed.proj.bias": theirs[f"{embeddings}.patch_embeddings.projection.bias"],
        **blocks,
        "module.v.norm.weight": theirs["audio_spectrogram_transformer.layernorm.weight"],
        "module.v.norm.bias": theirs["audio_spectrogram_transformer.layernorm.bias"],
        "module.v.head.weight": torch.zeros(1000, width),
        "module.v.head_dist.weight": torch.zeros(1000, width),
        "module.mlp_head.0.weight": theirs["classifier.layernorm.weight"],
        "module.mlp_head.0.bias": theirs["classifier.layernorm.bias"],
        "module.mlp_head.1.weight": theirs["classifier.dense.weight"],
        "module.mlp_head.1.bias": theirs["classifier.dense.bias"],
    }


def save_as_authors(model: ASTForAudioClassification, folder: Path) -> Path:
    torch.save(authors_names(model), folder / "audioset.pth")
    return folder / "audioset.pth"


def save_folder(model: ASTForAudioClassification, folder: Path) -> Path:
    model.save_pretrained(folder / "ast")
    return folder / "ast"


def save_only_the_file(model: ASTForAudioClassification, folder: Path) -> Path:
    return (save_folder(model, folder) / "model.safetensors").rename(folder / "alone.safetensors")


def save_names_in_memory(model: ASTForAudioClassification, folder: Path) -> Path:
    """As version 5 of transformers names them; version 4 has the names of what is saved."""
    assert "audio_spectrogram_transformer.layers.1.attention.q_proj.weight" in model.state_dict()
    torch.save({"state_dict": model.state_dict()}, folder / "memory.bin")
    return folder / "memory.bin"


LAYOUTS = (save_as_authors, save_folder, save_only_the_file, save_names_in_memory)


def begun(
    pretrained: Path | str,
    architecture: dict[str, Any],
    size: tuple[int, int],
    num_labels: int = NUM_LABELS,
) -> tuple[Encoder, Borrowed]:
    torch.manual_seed(1)
    config = EncoderConfig.model_validate(architecture | {"pretrained": str(pretrained)})
    encoder = Encoder(config, size, num_labels).eval()
    return encoder, borrow(encoder, config)


def spectrogram(num_clips: int, num_bands: int, num_frames: int) -> Tensor:
    return torch.randn(num_clips, num_frames, num_bands, generator=torch.Generator().manual_seed(2)) / 2


def image(features: Tensor) -> Tensor:
    return features.transpose(1, 2).unsqueeze(1)


@torch.no_grad()
def difference(model: ASTForAudioClassification, encoder: Encoder, num_clips: int, num_frames: int) -> float:
    features = spectrogram(num_clips, 128, num_frames)
    expected = model(features).logits
    assert expected.std() > 0.3  # otherwise nothing much could differ
    return float((encoder(image(features)) - expected).abs().max())


Deit = Callable[[str], tuple[Path, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> Deit:
    """A DeiT-Ti of a name of timm's, as its authors save it, and its weights."""
    folder = tmp_path_factory.mktemp("deit")

    @cache
    def make(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        weights = randomised(timm.create_model(name)).state_dict()
        torch.save({"model": weights}, folder / f"{name}.pth")
        return folder / f"{name}.pth", {key: value.numpy() for key, value in weights.items()}

    return make


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
@pytest.mark.parametrize("save", LAYOUTS)
def test_ast_gives_the_logits_of_transformers(
    save: Callable[[ASTForAudioClassification, Path], Path], eps: float, tmp_path: Path
) -> None:
    """Also with transformers' own epsilon, which is not the one that AST was trained with."""
    model = reference(layer_norm_eps=eps)
    encoder, report = begun(save(model, tmp_path), AST, (128, 64))
    assert difference(model, encoder, 3, 64) <= 1e-4
    assert report.fresh == ()
    assert not report.resized


@pytest.mark.slow
def test_ast_of_its_real_size_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    model = randomised(ASTForAudioClassification(ASTConfig(num_labels=527)))
    path = save_as_authors(model, tmp_path)  # type: ignore[arg-type]
    encoder, report = begun(path, {"preset": "ast_base"}, (128, 1024), 527)
    path.unlink()  # 350 MB
    assert difference(model, encoder, 1, 1024) <= 1e-4  # type: ignore[arg-type]
    assert report.fresh == ()
    assert set(report.dropped) == {"v.head.weight", "v.head_dist.weight"}


def test_weights_of_half_precision_are_taken(tmp_path: Path) -> None:
    model = reference()
    half = {name: weight.half() for name, weight in authors_names(model).items()}
    torch.save(half, tmp_path / "half.pt")
    encoder, _ = begun(tmp_path / "half.pt", AST, (128, 64))
    assert all(weight.dtype == torch.float32 for weight in encoder.parameters())
    assert difference(model, encoder, 2, 64) < 0.05


def test_an_ast_without_its_classifier_lacks_the_head_alone(tmp_path: Path) -> None:
    randomised(ASTModel(reference().config)).save_pretrained(tmp_path / "ast")  # type: ignore[attr-defined]
    _, report = begun(tmp_path / "ast", AST, (128, 64))
    assert report.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")


@pytest.mark.parametrize("save", [save_as_authors, save_folder])
def test_the_head_is_kept_for_as_many_labels_and_replaced_for_others(
    save: Callable[[ASTForAudioClassification, Path], Path], tmp_path: Path
) -> None:
    model = reference()
    path = save(model, tmp_path)
    kept, report = begun(path, AST, (128, 64))
    assert torch.equal(kept.head.weight, model.classifier.dense.weight)  # type: ignore[arg-type]
    assert "the head among them" in str(report)
    replaced, report = begun(path, AST, (128, 64), num_labels=3)
    assert replaced.head.weight.shape == (3, 16)
    assert report.fresh == ("head.weight", "head.bias")
    assert report.dropped["head.weight"] == report.dropped["head.bias"] == "7 labels, not 3"
    assert torch.equal(replaced.fc_norm.weight, model.classifier.layernorm.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frames", "stride", "grid"),
    [
        *((1024, 10, (12, 101)), (1024, 12, (10, 85)), (1024, 14, (9, 73)), (1024, 16, (8, 64))),
        *((512, 10, (12, 50)), (512, 16, (8, 32)), (128, 10, (12, 12))),
    ],
)
def test_the_rows_of_a_published_ast_are_found_without_its_config(
    frames: int, stride: int, grid: tuple[int, int], tmp_path: Path
) -> None:
    """Here two columns more are asked for, so that our own grid does not tell."""
    model = reference(max_length=frames, frequency_stride=stride, time_stride=stride)
    path, changes = save_as_authors(model, tmp_path), AST | {"stride": [stride, stride]}
    encoder, report = begun(path, changes, (128, frames + 2 * stride))
    rows, columns = grid
    assert report.resized == {"positions.grid": f"{rows} x {columns} -> {rows} x {columns + 2}"}
    theirs = model.audio_spectrogram_transformer.embeddings.position_embeddings[0, 2:].detach().numpy()
    expected = stretched(theirs.reshape(rows, columns, 16).swapaxes(0, 1), columns + 2).swapaxes(0, 1)
    np.testing.assert_allclose(encoder.positions.grid[0].detach(), expected, atol=1e-4)


@pytest.mark.parametrize(("bands", "frames"), [(64, 64), (96, 86)])
def test_positions_as_many_as_ours_are_taken_for_the_same_grid(bands: int, frames: int, tmp_path: Path) -> None:
    """Of 9 x 8, 12 would divide the number too."""
    model = reference(num_mel_bins=bands, max_length=frames)
    _, report = begun(save_as_authors(model, tmp_path), AST, (bands, frames))
    assert not report.resized


def test_rows_of_other_bands_are_told_by_the_config_beside_the_weights(tmp_path: Path) -> None:
    model = reference(num_mel_bins=64)
    encoder, report = begun(save_folder(model, tmp_path), AST, (64, 64))
    assert not report.resized
    theirs = model.audio_spectrogram_transformer.embeddings.position_embeddings
    torch.testing.assert_close(encoder.positions.grid.flatten(1, 2), theirs[:, 2:])


def stretched(values: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation along the first axis, where sample n stands for the n-th of equal cells."""
    out = np.empty((length, *values.shape[1:]))
    for index in range(length):
        place = min(max((index + 0.5) * len(values) / length - 0.5, 0), len(values) - 1)
        before = int(place)
        after = min(before + 1, len(values) - 1)
        out[index] = (1 - (place - before)) * values[before] + (place - before) * values[after]
    return out


def fitted(values: np.ndarray, length: int) -> np.ndarray:
    if length > len(values):
        return stretched(values, length)
    first = len(values) // 2 - length // 2
    return values[first : first + length]


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), size=st.tuples(st.integers(1, 20), st.integers(1, 20)))
@settings(max_examples=60)
def test_positions_are_cut_from_the_middle_or_interpolated(rows: int, columns: int, size: tuple[int, int]) -> None:
    grid = np.random.default_rng(rows).normal(size=(rows, columns, 3)).astype(np.float32)
    expected = fitted(fitted(grid, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)
    found = fit_positions(torch.from_numpy(grid)[None], size)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "change"),
    [
        ((128, 400), "14 x 14 -> 12 x 39"),
        ((128, 100), "14 x 14 -> 12 x 9"),
        ((256, 100), "14 x 14 -> 25 x 9"),
        ((256, 256), "14 x 14 -> 25 x 25"),
    ],
)
def test_an_image_transformer_keeps_its_middle_and_loses_its_colours(
    size: tuple[int, int], change: str, deit: Deit
) -> None:
    path, theirs = deit(DISTILLED)
    encoder, report = begun(path, DEIT, size)
    filters = np.zeros((192, 1, 16, 16))
    for channel in range(3):
        filters[:, 0] += theirs["patch_embed.proj.weight"][:, channel]
    np.testing.assert_allclose(encoder.patch_embed.proj.weight.detach(), filters, atol=1e-6)
    grid = theirs["pos_embed"][0, 2:].reshape(14, 14, 192)
    rows, columns = encoder.patch_embed.grid_size
    expected = fitted(fitted(grid, rows).swapaxes(0, 1), columns).swapaxes(0, 1)
    np.testing.assert_allclose(encoder.positions.grid[0].detach(), expected, atol=1e-5)
    np.testing.assert_array_equal(encoder.positions.first[0].detach(), theirs["pos_embed"][0, :2])
    np.testing.assert_array_equal(encoder.cls_token.detach(), theirs["cls_token"])
    np.testing.assert_array_equal(encoder.reg_token.detach(), theirs["dist_token"])
    for name, weight in encoder.blocks.named_parameters(prefix="blocks"):
        np.testing.assert_array_equal(weight.detach(), theirs[name])
    assert report.resized == {"positions.grid": change, "patch_embed.proj.weight": "3 channels summed"}
    assert set(report.dropped) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert set(report.dropped.values()) == {"of images"}
    assert report.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    ours = {name for name, _ in encoder.named_parameters()}
    assert {*report.matched, *report.resized, *report.fresh} == ours
    assert len(report.matched) + len(report.resized) + len(report.fresh) == len(ours)


@torch.no_grad()
def test_larger_patches_give_for_a_larger_image_what_theirs_give(deit: Deit) -> None:
    """How resampled filters are defined (Beyer 2023, FlexiViT)."""
    path, theirs = deit(DISTILLED)
    changes = {"patch": [32, 24], "stride": [32, 24]}
    encoder, report = begun(path, DEIT | changes, (128, 96))
    assert report.resized["patch_embed.proj.weight"] == "3 channels summed, 16 x 16 -> 32 x 24"
    small = image(spectrogram(5, 16, 16))
    large = F.interpolate(small, size=(32, 24), mode="bicubic", antialias=True)
    filters = torch.from_numpy(theirs["patch_embed.proj.weight"]).sum(1, keepdim=True)
    expected = F.conv2d(small, filters, torch.from_numpy(theirs["patch_embed.proj.bias"]))[:, :, 0, 0]
    torch.testing.assert_close(encoder.patch_embed(large)[:, 0, 0], expected, atol=1e-3, rtol=1e-3)


def test_separate_positions_are_the_nearest_sum_of_rows_and_columns(deit: Deit) -> None:
    path, theirs = deit(DISTILLED)
    encoder, report = begun(path, DEIT | {"stride": [16, 16], "positions": "separate"}, (224, 224))
    grid = theirs["pos_embed"][0, 2:].reshape(14, 14, 192)
    found = (encoder.positions.freq + encoder.positions.time)[0].detach().numpy()
    expected = grid.mean(1, keepdims=True) + grid.mean(0, keepdims=True) - grid.mean((0, 1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.cls_token[0, 0].detach(), (theirs["cls_token"] + theirs["pos_embed"])[0, 0])
    np.testing.assert_allclose(encoder.reg_token[0, 0].detach(), theirs["dist_token"][0, 0] + theirs["pos_embed"][0, 1])
    assert report.resized == {
        "cls_token": "and its position",
        "reg_token": "and its position",
        "patch_embed.proj.weight": "3 channels summed",
        "positions.freq": "mean of each row",
        "positions.time": "mean of each column",
    }


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "deit_tiny_patch16_224",
            {"pool": "cls_dist"},
            {"fresh": {"reg_token", "fc_norm.weight"}, "resized": {"positions.first": "of cls_token alone"}},
        ),
        (
            "deit_tiny_distilled_patch16_224",
            {"pool": "cls"},
            {"dropped": {"dist_token": "encoder.pool=cls"}, "resized": {"positions.first": "of cls_token alone"}},
        ),
        ("deit_tiny_patch16_224", {"pool": "cls"}, {"matched": {"positions.first", "cls_token", "norm.weight"}}),
        (
            "deit_tiny_patch16_224",
            {"pool": "mean"},
            {
                "dropped": {"cls_token": "encoder.pool=mean", "positions.first": "encoder.pool=mean"},
                "resized": {"fc_norm.weight": "of norm", "fc_norm.bias": "of norm"},
            },
        ),
        (
            "deit_tiny_patch16_224",
            {"pool": "attention"},
            {"fresh": {"attn_pool.q.weight"}, "matched": {"norm.weight"}},
        ),
        (
            "deit_tiny_patch16_224",
            {"stem": "conv", "pool": "cls"},
            {
                "dropped": {
                    "patch_embed.proj.weight": "encoder.stem=conv",
                    "patch_embed.proj.bias": "encoder.stem=conv",
                    "positions.grid": "encoder.stem=conv",
                },
                "matched": {"cls_token", "positions.first", "blocks.11.mlp.fc2.bias"},
                "fresh": {"patch_embed.proj.weight", "positions.grid"},
            },
        ),
    ],
)
def test_a_report_tells_what_matched_what_changed_what_is_dropped_and_what_is_fresh(
    name: str, changes: dict[str, Any], expected: dict[str, Any], deit: Deit
) -> None:
    path, theirs = deit(name)
    encoder, report = begun(path, DEIT | changes, (128, 100))
    for part, names in expected.items():
        found = getattr(report, part)
        assert (names.items() <= found.items()) if isinstance(names, dict) else (names <= set(found)), (part, found)
    ours = {name for name, _ in encoder.named_parameters()}
    assert {*report.matched, *report.resized, *report.fresh} == ours
    for same in report.matched:
        if not same.startswith("positions"):
            np.testing.assert_array_equal(encoder.get_parameter(same).detach(), theirs[same])
    assert (report.source, len(report.digest or "")) == (str(path), 64)


def test_a_report_is_a_few_lines(deit: Deit) -> None:
    path, _ = deit(DISTILLED)
    _, report = begun(path, DEIT, (128, 100))
    assert str(report).splitlines() == [
        f"begins with {path}: 150 weights as they are, not the head",
        "  patch_embed.proj.weight: 3 channels summed",
        "  positions.grid: 14 x 14 -> 12 x 9",
        "  dropped (of images): head.weight, head.bias, head_dist.weight, head_dist.bias",
        "  fresh: fc_norm.weight, fc_norm.bias, head.weight, head.bias",
    ]


def test_a_name_of_timm_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the download has happened: Hugging Face's cache holds the file, and the network is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^encoder\.pretrained=deit_tiny_patch16_224: timm does not get its w"):
        begun("deit_tiny_patch16_224", DEIT, (128, 100))
    model = randomised(timm.create_model("deit_tiny_patch16_224"))
    folder = tmp_path / "models--timm--deit_tiny_patch16_224.fb_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    encoder, report = begun("deit_tiny_patch16_224", DEIT, (128, 100))
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)  # type: ignore[union-attr]
    assert (report.source, report.digest) == ("deit_tiny_patch16_224", None)
    with pytest.raises(ConfigError, match=r"deit_tiny_patch16_224 has 3 heads of 64, .*; set encoder\.heads=3 encoder"):
        begun("deit_tiny_patch16_224", DEIT | {"heads": 6, "head_dim": 32}, (128, 100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads": 4, "depth": 2},
            (
                "has 3 heads of 64, depth 12, MLP ratio 4; "
                "set encoder.heads=3 encoder.head_dim=64 encoder.depth=12 encoder.mlp_ratio=4"
            ),
        ),
        ({"heads": 6, "head_dim": 32}, "has 3 heads of 64, depth 12"),
        ({"depth": 11}, "has 3 heads of 64, depth 12"),
        ({"mlp_ratio": 2.0}, "has 3 heads of 64, depth 12, MLP ratio 4"),
    ],
)
def test_another_size_is_refused_with_what_to_set(changes: dict[str, Any], message: str, deit: Deit) -> None:
    path, _ = deit(DISTILLED)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'encoder.pretrained={path} {message}')}"):
        begun(path, DEIT | changes, (128, 100))


def test_what_to_set_instead_of_a_preset_of_another_size_fits(deit: Deit) -> None:
    path, _ = deit(DISTILLED)
    with pytest.raises(ConfigError, match=r"; set encoder\.preset=none encoder\.stem=patch ") as refused:
        begun(path, {"preset": "ast_base"}, (128, 100))
    words = str(refused.value).partition("; set ")[2].split()
    remedy = {key.removeprefix("encoder."): value for key, value in parse_changes(words).items()}
    assert remedy["stride"] == [10, 10]
    fresh = begun(path, remedy, (128, 100))[1].fresh
    assert set(fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}  # the classes are others


def test_heads_that_a_file_does_not_tell_are_the_users(tmp_path: Path) -> None:
    path = save_as_authors(reference(), tmp_path)
    assert begun(path, AST | {"heads": 4, "head_dim": 4}, (128, 64))[1].fresh == ()
    message = (
        r"has width 16, depth 2, MLP ratio 4; set encoder\.heads x encoder\.head_dim to 16, encoder\.depth=2 encoder"
    )
    with pytest.raises(ConfigError, match=message):
        begun(path, AST | {"heads": 4}, (128, 64))
    folder = save_folder(reference(), tmp_path)  # where config.json tells
    with pytest.raises(ConfigError, match=r"has 2 heads of 8, depth 2"):
        begun(folder, AST | {"heads": 4, "head_dim": 4}, (128, 64))


def written(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("noise.pth", b"not a model", "is damaged or holds more than weights; get it anew, or as .safetensors"),
        ("noise.safetensors", b"not a model", "is damaged or holds more than weights"),
        ("empty.bin", b"", "is damaged or holds more than weights"),
        (
            "list.pt",
            [torch.zeros(2)],
            "fits nothing here (it holds no tensors, but no patch_embed.proj.weight); take a",
        ),
        (
            "other.safetensors",
            {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)},
            (
                "fits nothing here (it holds conv1.weight, fc.bias, but no patch_embed.proj.weight); take a ViT or "
                "DeiT as timm saves it, or an AST as its authors or transformers save it"
            ),
        ),
    ],
)
def test_a_file_that_fits_nothing_is_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'encoder.pretrained={path} {message}')}"):
        begun(path, AST, (128, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("module.v.blocks.1.attn.proj.weight"), "lacks blocks.1.attn.proj.weight; take a"),
        (
            lambda given: given.update({"module.v.blocks.0.ls1.gamma": torch.ones(16)}),
            "has blocks.0.ls1.gamma, for which there is no place here; take a plain ViT or DeiT, or an AST, and all of",
        ),
        (
            lambda given: given.update({"module.v.pos_embed": torch.zeros(1, 33, 16)}),
            "has 33 positions, 2 of them of tokens, and nothing tells how the others form rows; keep its config.json",
        ),
        (lambda given: given.update({"module.v.pos_embed": torch.zeros(1, 2, 16)}), "has 2 positions, 2 of them of"),
        (lambda given: given.pop("module.v.pos_embed"), "fits nothing here (it holds cls_token, dist_token, patch_"),
        (
            lambda given: given.update({"module.v.pos_embed": torch.zeros(2, 34, 16)}),
            "has pos_embed of [2, 34, 16], not of [1, n, 16]; take weights as they were published",
        ),
        (lambda given: given.update({"module.v.cls_token": torch.zeros(16)}), "has cls_token of [16], not of [1, n, "),
        (lambda given: given.update({"module.v.norm.weight": torch.ones(1)}), "has norm.weight of [1], not of [16]; "),
        (
            lambda given: given["module.v.blocks.0.attn.qkv.weight"].fill_(math.nan),
            "has blocks.0.attn.qkv.weight not all numbers; take weights as they were published",
        ),
    ],
)
def test_another_network_and_half_a_one_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    given = authors_names(reference())
    change(given)
    path = written(tmp_path / "odd.pth", given)
    with pytest.raises(CheckpointError, match=re.escape(f"encoder.pretrained={path} {message}")):
        begun(path, AST, (128, 64))


def test_half_an_attention_is_refused(tmp_path: Path) -> None:
    given = reference().state_dict()
    del given["audio_spectrogram_transformer.layers.1.attention.k_proj.weight"]
    path = written(tmp_path / "odd.pth", given)
    with pytest.raises(CheckpointError, match=r"has blocks\.1\.attn\.query\.weight, for which there is no place"):
        begun(path, AST, (128, 64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pth", "none.pth: no such file; name one that exists, or a model that timm knows"),
        ("./nothing", "nothing: no such file"),
        ("./", ". is a folder without model.safetensors or pytorch_model.bin; name the file itself"),
        ("./notes.txt", "notes.txt does not end in .safetensors, .bin, .pth, .pt; name such a file"),
        (
            "deit_tiny_patch16_225",
            "deit_tiny_patch16_225 is no ViT or DeiT that timm knows; did you mean deit_tiny_patch",
        ),
        ("resnet18", "resnet18 is no ViT or DeiT that timm knows; "),
        (
            "ast",
            "ast is no ViT or DeiT that timm knows; A file must end in .safetensors, .bin, .pth, .pt, a folder must",
        ),
    ],
)
def test_a_name_of_nothing_is_refused(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("weights")
    with pytest.raises(ConfigError, match=f"^{re.escape(f'encoder.pretrained={message}')}"):
        begun(name, AST, (128, 64))


class Trap:
    """What a pickle could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_a_file_that_would_run_code_runs_none(how: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "trap.pth"
    if how == "zip":
        torch.save({"cls_token": Trap(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"cls_token": Trap(trace)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"trap\.pth is damaged or holds more than weights"):
        begun(path, AST, (128, 64))
    assert not trace.exists()
    if how == "bare":
        pickle.loads(path.read_bytes())  # noqa: S301
        assert trace.exists()  # so the trap works


NARROW = {
    "data.clip_s": 0.5,
    "encoder.stem": "patch",
    "encoder.patch": [8, 8],
    "encoder.stride": [8, 4],
    "encoder.pool": "cls_dist",
    "encoder.heads": 2,
    "encoder.head_dim": 8,
    "encoder.depth": 1,
    "encoder.mlp_ratio": 4.0,
}


@pytest.fixture
def narrow_ast(tmp_path: Path) -> Path:
    """An AST whose size is the tiny run's, of as many labels."""
    changes = {"num_hidden_layers": 1, "num_labels": 10, "patch_size": 8, "num_mel_bins": 16, "max_length": 24}
    strides = {"frequency_stride": 8, "time_stride": 4}
    return save_folder(reference(**changes, **strides), tmp_path)


def test_a_run_begins_with_the_weights_and_goes_on_without_their_file(
    narrow_ast: Path, packed: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a rate that moves nothing."""
    changes = {**PLAIN, **NARROW, "optim.lr": 1e-12, "optim.name": "sgd", "encoder.pretrained": str(narrow_ast)}
    config = tiny(packed, cache_dir, tmp_path / "runs", changes)
    steps = iter(range(100))
    with caplog.at_level(logging.INFO), pytest.raises(Stopped):
        train(config, local(config, should_stop=lambda: next(steps) >= 2))
    assert f"begins with {narrow_ast}: " in caplog.text
    assert "the head among them" in caplog.text
    assert "from scratch" not in caplog.text
    theirs = ASTForAudioClassification.from_pretrained(narrow_ast).state_dict()
    for saved in narrow_ast.iterdir():
        saved.unlink()
    weights = load_state(newest(run_folder(config)))["model"]
    block = "audio_spectrogram_transformer.layers.0"
    for ours, name in {
        "encoder.blocks.0.mlp.fc1.weight": f"{block}.mlp.fc1.weight",
        "encoder.blocks.0.attn.proj.bias": f"{block}.attention.o_proj.bias",
        "encoder.head.weight": "classifier.dense.weight",
        "encoder.cls_token": "audio_spectrogram_transformer.embeddings.cls_token",
    }.items():
        torch.testing.assert_close(weights[ours], theirs[name], atol=1e-6, rtol=0)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert train(config, local(config))["epoch"] == 4
    assert "begins with" not in caplog.text
    saved = load_model(run_folder(config))
    torch.testing.assert_close(saved.model.encoder.head.weight, theirs["classifier.dense.weight"], atol=1e-6, rtol=0)


def test_the_defaults_are_said_to_be_for_fresh_weights(
    narrow_ast: Path, packed: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optim = {f"optim.{key}": value for key, value in OptimConfig().model_dump().items()}
    config = tiny(packed, cache_dir, tmp_path, {**NARROW, **optim, "encoder.pretrained": str(narrow_ast)})
    with caplog.at_level(logging.WARNING), pytest.raises(Stopped):
        train(config, local(config, should_stop=lambda: True))
    assert "optim.name=muon with optim.lr=0.002 is for training from scratch" in caplog.text


def test_other_ranks_say_nothing(
    narrow_ast: Path, packed: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {**NARROW, "train.epochs": 1, "encoder.pretrained": str(narrow_ast)}
    config = tiny(packed, cache_dir, tmp_path / "runs", changes)
    context = local(config, should_stop=lambda: True)
    context.rank = 1
    with caplog.at_level(logging.INFO), pytest.raises(Stopped):
        train(config, context)
    assert "begins with" not in caplog.text


def test_a_run_records_its_weights_and_finds_out_before_it_writes_that_they_do_not_fit(
    narrow_ast: Path, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    changes = {**NARROW, "train.epochs": 1, "encoder.pretrained": str(narrow_ast)}
    config = tiny(packed, cache_dir, tmp_path / "runs", changes)
    with pytest.raises(Stopped):
        run_here(config, should_stop=lambda: True)
    narrow_ast.rename(tmp_path / "moved")
    outcome = run_here(config)
    (tmp_path / "moved").rename(narrow_ast)
    recorded = (outcome.folder / "pretrained.json").read_text()
    assert f'"source": "{narrow_ast}"' in recorded
    assert '"digest": "' in recorded
    assert '"fresh": []' in recorded
    wide = tiny(packed, cache_dir, tmp_path / "wide", changes | {"encoder.heads": 4})
    with pytest.raises(ConfigError, match=r"has 2 heads of 8, depth 1, MLP ratio 4; set encoder\.heads=2"):
        run_here(wide)
    assert not (tmp_path / "wide").exists()


def test_a_relative_path_is_resolved_and_a_link_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's cache links model.safetensors to a file without a suffix."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "model.safetensors").symlink_to("blob")
    for pretrained, expected in {
        "model.safetensors": str(tmp_path / "model.safetensors"),
        "deit_tiny_patch16_224": "deit_tiny_patch16_224",
        "none": "none",
    }.items():
        found = absolute(from_flat({"encoder.pretrained": pretrained, "tracking.mlflow": False}))
        assert found.encoder.pretrained == expected
