"""Augmentation changes what a clip sounds like, never what it is, and only as far as the config allows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny
from torch import Tensor

from meamtm.config import AugmentConfig, MelConfig, MixConfig
from meamtm.data.clips import Clips
from meamtm.data.loader import Loader
from meamtm.training.augment import NOISE_RANGE_DB, augment_waveform, mix, spectrogram_mask
from meamtm.training.prepare import training_batches

OFF = {"roll": 0.0, "gain_db": 0.0, "speed": 0.0, "noise_db": None, "time_mask": 0.0, "freq_mask": 0.0}
MEL = MelConfig()
seeds = st.integers(0, 2**31)


def only(**changes: Any) -> AugmentConfig:
    return AugmentConfig.model_validate(OFF | changes)


def mixing(**changes: Any) -> MixConfig:
    return MixConfig.model_validate(changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num_clips: int = 6, num_samples: int = 500) -> Tensor:
    """Clips of quite different loudness."""
    level = torch.logspace(-2, 0, num_clips)[:, None]
    return level * torch.randn(num_clips, num_samples, generator=generator(99))


def level_db(waveform: Tensor) -> Tensor:
    return 10 * torch.log10(waveform.square().mean(-1))


def test_nothing_happens_when_everything_is_off() -> None:
    assert torch.equal(augment_waveform(noise(), only(), generator()), noise())
    for off in (mixing(kind="none"), mixing(prob=0)):
        waveform, target = mix(noise(), torch.eye(6), off, MEL, generator())
        assert torch.equal(waveform, noise())
        assert torch.equal(target, torch.eye(6))
    assert spectrogram_mask((6, 16, 20), only(), generator()) is None


ALL = only(roll=1, gain_db=6, speed=0.2, noise_db=10, time_mask=0.3, freq_mask=0.3)
EVERYTHING: list[Callable[[torch.Generator], Tensor | None]] = [
    lambda draws: augment_waveform(noise(), ALL, draws),
    lambda draws: mix(noise(), torch.eye(6), mixing(kind="mixup", alpha=0.4), MEL, draws)[0],
    lambda draws: mix(noise(), torch.eye(6), mixing(kind="between_class"), MEL, draws)[1],
    lambda draws: spectrogram_mask((6, 16, 20), ALL, draws),
]


@pytest.mark.parametrize("change", EVERYTHING, ids=["waveform", "mixup", "between-class", "masks"])
def test_one_seed_gives_one_result_whatever_torchs_own_generator_says(
    change: Callable[[torch.Generator], Tensor],
) -> None:
    torch.manual_seed(1)
    first = change(generator(3))
    torch.manual_seed(2)
    assert torch.equal(first, change(generator(3)))
    assert not torch.equal(first, change(generator(4)))


@pytest.mark.parametrize("change", [only(roll=1), only(gain_db=6), only(speed=0.2), only(noise_db=10)])
def test_the_clips_that_come_in_are_left_as_they_are(change: AugmentConfig) -> None:
    waveform = noise()
    augment_waveform(waveform, change, generator())
    mix(waveform, torch.eye(6), mixing(), MEL, generator())
    assert torch.equal(waveform, noise())


@given(seed=seeds, num_samples=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_roll_is_a_circular_shift(seed: int, num_samples: int) -> None:
    waveform = torch.arange(float(num_samples)).expand(4, -1)
    rolled = augment_waveform(waveform, only(roll=1), generator(seed))
    for clip in rolled:
        assert torch.equal(clip, torch.arange(float(num_samples)).roll(-int(clip[0])))


def test_rolls_reach_everywhere_and_happen_as_often_as_asked() -> None:
    waveform = torch.arange(8.0).expand(4_000, -1)
    always = augment_waveform(waveform, only(roll=1), generator())[:, 0]
    assert torch.bincount(always.long(), minlength=8).min() > 400  # 500 each are expected
    sometimes = augment_waveform(waveform, only(roll=0.25), generator())[:, 0]
    assert float((sometimes != 0).float().mean()) == pytest.approx(0.25 * 7 / 8, abs=0.03)


@given(seed=seeds, gain_db=st.floats(0.1, 40))
@settings(max_examples=40, deadline=None)
def test_gain_stays_within_its_bound(seed: int, gain_db: float) -> None:
    louder = augment_waveform(noise(), only(gain_db=gain_db), generator(seed))
    change_db = level_db(louder) - level_db(noise())
    assert change_db.abs().max() <= gain_db + 1e-3
    torch.testing.assert_close(louder, noise() * (10 ** (change_db / 20))[:, None], atol=1e-4, rtol=1e-4)


def test_gains_use_the_whole_range() -> None:
    louder = augment_waveform(noise(2_000, 50), only(gain_db=6), generator())
    change_db = level_db(louder) - level_db(noise(2_000, 50))
    assert float(change_db.min()) < -5.9
    assert float(change_db.max()) > 5.9
    assert abs(float(change_db.mean())) < 0.3


@given(seed=seeds, noise_db=st.floats(0, 40))
@settings(max_examples=20, deadline=None)
def test_noise_has_the_ratio_that_was_asked_for(seed: int, noise_db: float) -> None:
    clean = noise(4, 20_000)
    added = augment_waveform(clean, only(noise_db=noise_db), generator(seed)) - clean
    ratio_db = level_db(clean) - level_db(added)
    assert float(ratio_db.min()) > noise_db - 0.3
    assert float(ratio_db.max()) < noise_db + NOISE_RANGE_DB + 0.3


def test_silence_gets_no_noise() -> None:
    silence = torch.zeros(3, 100)
    assert torch.equal(augment_waveform(silence, only(noise_db=0), generator()), silence)


def test_speed_stays_within_its_bound_and_pitch_follows() -> None:
    num_samples, cycles = 8_000, 400
    tone = torch.sin(2 * torch.pi * cycles * torch.arange(num_samples) / num_samples).expand(200, -1)
    played = augment_waveform(tone, only(speed=0.15), generator())
    assert played.shape == tone.shape
    crossings = ((played[:, :-1] < 0) & (played[:, 1:] >= 0)).sum(1)  # (batch,): cycles of each clip
    speeds = crossings / cycles
    assert float(speeds.min()) == pytest.approx(0.875, abs=0.003)  # 28/32
    assert float(speeds.max()) == pytest.approx(1.125, abs=0.003)
    assert float(speeds.mean()) == pytest.approx(1.0, abs=0.03)
    assert played.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_at_another_speed_lies_linearly_between_two(seed: int) -> None:
    clip = torch.randn(1_000, generator=generator(5))
    played = augment_waveform(clip[None], only(speed=0.5), generator(seed))[0]
    twice, position = np.tile(clip.numpy(), 2), np.arange(1_000)
    closest = min(
        np.abs(np.interp(position * speed / 64, np.arange(2_000), twice) - played.numpy()).max()
        for speed in range(32, 97)
    )
    assert closest < 1e-5


@given(seed=seeds, speed=st.floats(0.01, 0.5), num_samples=st.integers(2, 300))
@settings(max_examples=50, deadline=None)
def test_a_ramp_that_is_sped_up_stays_a_ramp_that_begins_again(seed: int, speed: float, num_samples: int) -> None:
    ramp = torch.arange(float(num_samples)).expand(3, -1)
    played = augment_waveform(ramp, only(speed=speed), generator(seed))
    for clip in played:
        steps = clip.diff()
        rising = steps[steps >= 0]
        assert clip[0] == 0
        assert clip.min() >= 0
        assert clip.max() <= num_samples - 1 + 1e-4
        assert (steps < 0).sum() <= 2  # where it begins again, be it between two samples
        assert rising.max() <= 1 + speed + 1e-3


@pytest.mark.parametrize("alpha", [0.02, 0.4, 1.0, 5.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha: float) -> None:
    _, target = mix(noise(1_000, 4), torch.eye(1_000), mixing(kind="mixup", alpha=alpha), MEL, generator(7))
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        found = float((target.diagonal() <= share).float().mean())
        assert found == pytest.approx(scipy.stats.beta(alpha, alpha).cdf(share), abs=0.05), share


@given(
    seed=seeds,
    kind=st.sampled_from(["mixup", "between_class", "timemix", "freqmix"]),
    alpha=st.floats(0.01, 20),
    num_clips=st.integers(1, 9),
    num_labels=st.integers(2, 5),
)
@settings(max_examples=100, deadline=None)
def test_mixing_conserves_label_mass(seed: int, kind: str, alpha: float, num_clips: int, num_labels: int) -> None:
    target = torch.rand(num_clips, num_labels, generator=generator(seed)).softmax(1)
    waveform, mixed = mix(noise(num_clips), target, mixing(kind=kind, alpha=alpha), MEL, generator(seed))
    torch.testing.assert_close(mixed.sum(1), torch.ones(num_clips))
    assert mixed.min() >= 0
    assert waveform.isfinite().all()


def shares(target: Tensor) -> tuple[Tensor, int]:
    """From what became of one label per clip: the share of each clip itself, and how far away its partner was."""
    own = target.diagonal()
    partner = (target - torch.diag(own)).argmax(1)
    shift = (torch.arange(len(target)) - partner) % len(target)
    assert len(shift.unique()) == 1
    return own, int(shift[0])


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_mixup_adds_in_those_shares(seed: int) -> None:
    mixed, target = mix(noise(), torch.eye(6), mixing(kind="mixup"), MEL, generator(seed))
    share, shift = shares(target)
    assert 1 <= shift < 6
    expected = share[:, None] * noise() + (1 - share)[:, None] * noise().roll(shift, 0)
    torch.testing.assert_close(mixed, expected)


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_between_class_weights_follow_the_published_formula(seed: int) -> None:
    """Tokozume 2018, equations 1 and 2: p = 1 / (1 + 10^((G1 - G2) / 20) (1 - r) / r), over sqrt(p^2 + (1 - p)^2)."""
    mixed, target = mix(noise(), torch.eye(6), mixing(kind="between_class"), MEL, generator(seed))
    share, shift = shares(target)
    first, second = noise(), noise().roll(shift, 0)
    part = 1 / (1 + 10 ** ((level_db(first) - level_db(second)) / 20) * (1 - share) / share)
    expected = (part[:, None] * first + (1 - part)[:, None] * second) / (part**2 + (1 - part) ** 2).sqrt()[:, None]
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_timemix_plays_each_clip_for_its_share_of_the_time(seed: int) -> None:
    mixed, target = mix(noise(), torch.eye(6), mixing(kind="timemix"), MEL, generator(seed))
    share, shift = shares(target)
    first, second = noise(), noise().roll(shift, 0)
    is_first = mixed == first
    assert torch.equal(mixed[~is_first], second[~is_first])
    torch.testing.assert_close(is_first.float().mean(1), share, atol=1.5 / mixed.shape[1], rtol=0)
    assert int((is_first[:, 1:] != is_first[:, :-1]).sum(1).max()) <= 2, "the other clip is in one piece"


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_freqmix_plays_each_clip_in_its_share_of_the_mel_scale_that_is_heard(seed: int) -> None:
    heard = MelConfig(fmin_hz=500, fmax_hz=5_000)
    mixed, target = mix(noise(6, 4_000), torch.eye(6), mixing(kind="freqmix"), heard, generator(seed))
    share, shift = shares(target)
    first, second = torch.fft.rfft(noise(6, 4_000)), torch.fft.rfft(noise(6, 4_000).roll(shift, 0))
    found = torch.fft.rfft(mixed)
    is_first = (found - first).abs() < (found - second).abs()
    torch.testing.assert_close(found, torch.where(is_first, first, second), atol=1e-3, rtol=1e-3)
    frequency_hz = np.fft.rfftfreq(4_000, 1 / heard.sample_rate_hz)
    mel = 2595 * np.log10(1 + frequency_hz / 700)
    widths = torch.from_numpy(np.gradient(mel) * (frequency_hz >= 500) * (frequency_hz < 5_000)).float()
    widths /= widths.sum()
    torch.testing.assert_close((is_first * widths).sum(1), share, atol=5e-3, rtol=0)
    assert int((is_first[:, 1:] != is_first[:, :-1]).sum(1).max()) <= 2, "the other clip is in one band"


def test_silence_mixes_without_harm() -> None:
    waveform = torch.cat((torch.zeros(2, 500), noise(2)))
    for seed in range(10):
        mixed, _ = mix(waveform, torch.eye(4), mixing(kind="between_class"), MEL, generator(seed))
        assert mixed.isfinite().all()
        assert mixed.abs().max() < 10


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_beside_silence_a_clip_is_left_alone(seed: int) -> None:
    """Given the loudness of silence it would be gone, and its label would stay."""
    waveform = noise(4)
    waveform[[0, 2]] = 0
    mixed, target = mix(waveform, torch.eye(4), mixing(kind="between_class"), MEL, generator(seed))
    for heard, label in zip(mixed, target, strict=True):
        clip = int(label.argmax())
        if label[clip] == 1 and clip in (1, 3):
            assert torch.equal(heard, waveform[clip])
        else:
            assert set(label.nonzero().flatten().tolist()) in ({0, 2}, {1, 3}), "two that sound, or two that do not"


@pytest.mark.parametrize(
    ("until", "epochs", "num_mixed"), [(0.0, 4, 0), (0.5, 4, 2), (0.6, 4, 3), (1.0, 4, 4), (0.14, 50, 7)]
)
def test_the_last_epochs_hear_clips_alone(  # noqa: PLR0917
    until: float, epochs: int, num_mixed: int, clips: Clips, packed: Path, cache_dir: Path
) -> None:
    """One that begins before the fraction is over still mixes."""
    config = tiny(packed, cache_dir, Path("runs"), {"mix.until": until, "train.epochs": epochs})
    loader = Loader(clips, np.arange(40), config.clip_samples, 20, seed=0, train=True)
    are_mixed = []
    for epoch in range(epochs):
        batches = training_batches(loader, config, torch.device("cpu"), epoch=epoch)
        are_mixed.append(any(bool((batch.target.amax(1) < 1).any()) for batch in batches))
    assert are_mixed == [epoch < num_mixed for epoch in range(epochs)]


def test_batches_are_mixed_as_often_as_asked_and_a_lone_clip_never() -> None:
    draws, config = generator(), mixing(kind="mixup", prob=0.3)
    times = sum(
        not torch.equal(mix(noise(2, 4), torch.eye(2), config, MEL, draws)[1], torch.eye(2)) for _ in range(1_000)
    )
    assert 250 < times < 350
    assert torch.equal(mix(noise(1), torch.eye(1), mixing(prob=1), MEL, draws)[0], noise(1))


@given(
    seed=seeds,
    time_mask=st.floats(0, 0.9),
    freq_mask=st.floats(0.01, 0.9),
    num_bands=st.integers(11, 40),
    num_frames=st.integers(11, 80),
)
@settings(max_examples=100, deadline=None)
def test_masks_are_one_block_of_bands_and_one_of_frames_within_bounds(
    seed: int, time_mask: float, freq_mask: float, num_bands: int, num_frames: int
) -> None:
    config = only(time_mask=time_mask, freq_mask=freq_mask)
    mask = spectrogram_mask((5, num_bands, num_frames), config, generator(seed))
    assert mask is not None
    bands, frames = mask.all(2), mask.all(1)  # rows and columns that are masked throughout
    assert torch.equal(mask, bands[:, :, None] | frames[:, None, :])
    for masked, widest in ((bands, freq_mask * num_bands), (frames, time_mask * num_frames)):
        assert masked.sum(1).max() <= np.ceil(widest)
        edges = torch.nn.functional.pad(masked.int(), (1, 1)).diff().abs().sum(1)
        assert edges.max() <= 2  # one block


def test_masks_differ_from_clip_to_clip_and_reach_every_cell() -> None:
    mask = spectrogram_mask((2_000, 10, 20), only(time_mask=0.3, freq_mask=0.3), generator())
    assert mask is not None
    often = mask.float().mean(0)  # (band, frame)
    assert float(often.min()) > 0.05
    assert float(often.max()) < 0.6
