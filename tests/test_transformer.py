"""The model hears a clip the same way alone and in company, masked or whole, short or long."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meamtm.config import from_flat
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import Labels, load_model, publish, save

SMALL = {
    "data.clip_s": 0.5,
    "mel.sample_rate_hz": 8_000,
    "mel.num_bands": 16,
    "mel.hop_ms": 20.0,
    "encoder.stem_channels": [8, 8],
    "encoder.patch": [8, 8],
    "encoder.stride": [8, 4],
    "encoder.heads": 2,
    "encoder.head_dim": 8,
    "encoder.depth": 2,
}
POOLS = ("mean", "cls", "attention")
STEMS = ("conv", "patch")


def model(num_labels: int = 5, **changes: Any) -> AudioTransformer:
    torch.manual_seed(0)
    dotted = {f"encoder.{key}": value for key, value in changes.items()}
    made = AudioTransformer(from_flat(SMALL | dotted), num_labels).eval()
    made.mel.fit(-6.0, 2.0)
    for parameter in made.encoder.head.parameters():  # timm begins with a head of zeros, behind which all looks alike
        torch.nn.init.normal_(parameter)
    return made


def noise(num_clips: int = 4, num_samples: int = 4_000) -> Tensor:
    return 0.1 * torch.randn(num_clips, num_samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_every_pool_and_stem_gives_logits_and_embeddings(pool: str, stem: str) -> None:
    made = model(pool=pool, stem=stem)
    assert made(noise()).shape == (4, 5)
    assert made.features(noise()).shape == (4, 16)
    assert made(noise()).std(0).min() > 0  # clips are told apart
    torch.testing.assert_close(made.encoder.head(made.features(noise())), made(noise()))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_a_clip_alone_equals_the_same_clip_in_a_batch(pool: str, stem: str) -> None:
    made = model(pool=pool, stem=stem)
    together = made(noise())
    for number, clip in enumerate(noise()):
        torch.testing.assert_close(made(clip[None])[0], together[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_samples", [2_000, 3_999, 4_001, 9_000])
@pytest.mark.parametrize("stem", STEMS)
@torch.no_grad()
def test_clips_of_another_length_than_trained_are_heard(stem: str, num_samples: int) -> None:
    assert model(stem=stem)(noise(2, num_samples)).isfinite().all()


@pytest.mark.parametrize("stem", STEMS)
@torch.no_grad()
def test_masked_cells_are_the_mean(stem: str) -> None:
    made = model(stem=stem)
    log_mel = made.mel(noise())
    mask = torch.rand(log_mel.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    expected = made.encoder(torch.where(mask, torch.zeros(()), log_mel).unsqueeze(1))
    assert torch.equal(made(noise(), mask), expected)
    assert not torch.equal(made(noise(), mask), made(noise()))
    everything = made(noise(), torch.ones_like(mask))
    torch.testing.assert_close(everything, everything[:1].expand(4, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", POOLS)
def test_patches_are_left_out_in_training_alone(pool: str) -> None:
    made = model(stem="patch", patchout=0.5, pool=pool)
    num_patches, num_prefix = made.encoder.patch_embed.num_patches, made.encoder.num_prefix_tokens
    seen: list[int] = []
    made.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    made(noise())
    made.train()(noise())
    assert num_patches == 10
    assert seen == [num_patches + num_prefix, num_patches // 2 + num_prefix]


def test_all_that_is_random_rests_in_evaluation() -> None:
    made = model(patchout=0.5, dropout=0.5, drop_path=0.5, stem="patch")
    assert torch.equal(made(noise()), made(noise()))
    made.train()
    assert not torch.equal(made(noise()), made(noise()))


def test_every_weight_learns_and_no_kernel_does() -> None:
    made = model(pool="attention").train()
    made(noise()).square().sum().backward()
    still = [name for name, weight in made.named_parameters() if weight.grad is None or not weight.grad.abs().max() > 0]
    assert [name for name in still if ".k." not in name] == []
    assert all(name.startswith("encoder.") for name, _ in made.named_parameters())


def test_one_seed_makes_one_model() -> None:
    one, two = model().state_dict(), model().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("changes", [{"stem": "conv"}, {"stem": "patch", "positions": "separate", "pool": "cls_dist"}])
def test_one_checkpoint_hears_a_second_and_a_minute_alone_and_in_a_padded_batch(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = from_flat(SMALL | {"data.clip_s": 5.0} | {f"encoder.{key}": value for key, value in changes.items()})
    torch.manual_seed(0)
    made = AudioTransformer(config, 5)
    torch.nn.init.normal_(made.encoder.head.weight)  # type: ignore[reportArgumentType]
    labels = Labels(tuple("abcde"), False, "0")
    scratch = save(config, labels, made.state_dict(), {"losses": []}, {}, cursor=(1, 0))
    publish(scratch, tmp_path / "run")
    heard = load_model(tmp_path / "run").model
    lengths = [round(8_000 * seconds) for seconds in (1, 5, 12.3, 60)]
    clips = [noise(1, length)[0] for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.inference_mode():
        alone = torch.cat([heard(clip[None]) for clip in clips])
        together = heard(padded, num_samples=torch.tensor(lengths))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert len({tuple(row.tolist()) for row in alone}) == len(lengths)
