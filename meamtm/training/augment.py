"""Training clips -> changed training clips: waveforms are shifted, sped up, made louder, noisier and mixed;
spectrograms are masked. Every draw comes from the generator that is passed in."""

import math
from functools import cache

import torch
from jaxtyping import Bool, Float, Int16, Shaped
from torch import Tensor

from meamtm.config import AugmentConfig, MelConfig, MixConfig
from meamtm.data.audio import FULL_SCALE

Samples = Int16[Tensor, "batch time"] | Float[Tensor, "batch time"]
Waveform = Float[Tensor, "batch time"]
Target = Float[Tensor, "batch label"]
SPEED_STEPS = 32
"""Playing speeds are n/32, half a semitone apart around 1; finer ones would cost time in proportion."""
SILENCE = 1e-5
"""Level below which nothing is heard: a third of the smallest step of 16 bits."""
NOISE_RANGE_DB = 30.0
"""Added noise lies from `augment.noise_db` up to this far above it."""


def augment_waveform(samples: Samples, config: AugmentConfig, generator: torch.Generator) -> Waveform:
    """Changes each clip on its own: 16-bit samples, or float ones in -1..1, become float ones in about -1..1."""
    played = _roll_speed_and_gain(samples, config, generator)
    return played if config.noise_db is None else _add_noise(played, config.noise_db, generator)


def mix(
    waveform: Waveform, target: Target, config: MixConfig, mel: MelConfig, generator: torch.Generator
) -> tuple[Waveform, Target]:
    """Puts another clip of the batch into each, and into its target the other's, in shares that sum to 1."""
    if config.kind == "none" or len(waveform) < 2 or _uniform(1, 0, 1, generator).item() >= config.prob:
        return waveform, target
    shift = int(torch.randint(1, len(waveform), (1,), generator=generator).item())
    share = _beta(len(waveform), config.alpha, generator).to(waveform.device)
    weight, other_weight = share, 1 - share
    if config.kind == "between_class":
        share, weight, other_weight = _shares_by_loudness(waveform, shift, share)
    mixed_target = share[:, None] * target + (1 - share)[:, None] * target.roll(shift, 0)
    if config.kind == "timemix":
        return _replace_part(waveform, waveform.roll(shift, 0), share, generator), mixed_target
    if config.kind == "freqmix":
        return _replace_band(waveform, waveform.roll(shift, 0), share, mel, generator), mixed_target
    mixed = waveform * weight[:, None]
    mixed[shift:].addcmul_(waveform[:-shift], other_weight[shift:, None])  # in two parts, for want of a rolled copy
    mixed[:shift].addcmul_(waveform[-shift:], other_weight[:shift, None])
    return mixed, mixed_target


def spectrogram_mask(
    size: tuple[int, int, int], config: AugmentConfig, generator: torch.Generator
) -> Bool[Tensor, "batch band frame"] | None:
    """Draws one time mask and one frequency mask per clip (Park 2019) for (batch, bands, frames); True is masked."""
    if config.time_mask == 0 and config.freq_mask == 0:
        return None
    num_clips, num_bands, num_frames = size
    bands = _interval(num_clips, num_bands, config.freq_mask, generator)
    frames = _interval(num_clips, num_frames, config.time_mask, generator)
    return bands[:, :, None] | frames[:, None, :]


def _roll_speed_and_gain(samples: Samples, config: AugmentConfig, generator: torch.Generator) -> Waveform:
    """Shifts each clip circularly and plays it faster or slower, round and round until the output is full, and louder
    or softer.

    Speed n/32 gives 32 samples for every n, each interpolated linearly between two: a product of frames of n samples
    and one small matrix. 4x faster than reading between samples by index, which moves 16 bytes for 4; and a clip stays
    in the processor's cache from its 16 bits to what is played.
    """
    num_clips, num_samples = samples.shape
    num_frames = -(-num_samples // SPEED_STEPS)
    rolled = _uniform(num_clips, 0, 1, generator) < config.roll
    shifts = (torch.randint(0, num_samples, (num_clips,), generator=generator) * rolled).tolist()
    slowest, fastest = math.ceil((1 - config.speed) * SPEED_STEPS), math.floor((1 + config.speed) * SPEED_STEPS)
    speeds = torch.randint(slowest, fastest + 1, (num_clips,), generator=generator).tolist()
    unit = 1.0 if samples.is_floating_point() else 1 / FULL_SCALE
    gains = (unit * 10 ** (_uniform(num_clips, -config.gain_db, config.gain_db, generator) / 20)).tolist()
    out = torch.empty(num_clips, num_frames * SPEED_STEPS, device=samples.device)
    buffer = torch.empty(num_frames * fastest + 1, device=samples.device)
    for played, clip, shift, speed, gain in zip(out, samples, shifts, speeds, gains, strict=True):
        heard = _circular(clip, shift, buffer[: num_frames * speed + 1])
        if speed == SPEED_STEPS:
            torch.mul(heard[:-1], gain, out=played)
            continue
        num_parts = 2 - speed % 2  # of a frame, where it can be halved; that halves the product
        width, num_steps = speed // num_parts, SPEED_STEPS // num_parts
        frames, stepped = heard[:-1].view(-1, width), played.view(-1, num_steps)
        weights = _interpolation(width, num_steps, samples.device)
        torch.addmm(stepped, frames, weights, beta=0, alpha=gain, out=stepped)
        if speed < SPEED_STEPS:  # a frame's last sample lies between it and the next frame
            stepped[:, -1].add_(heard[width::width], alpha=gain * (1 - speed / SPEED_STEPS))
    return out[:, :num_samples]


@cache
def _interpolation(width: int, num_steps: int, device: torch.device) -> Float[Tensor, "sample step"]:
    """How much of each of a frame's samples is in each of those that are played."""
    position = torch.arange(num_steps) * width / num_steps
    return (1 - (position - torch.arange(width)[:, None]).abs()).clamp_min(0).to(device)


def _circular(clip: Shaped[Tensor, " time"], start: int, out: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
    """Reads a clip from `start` on, and again from its beginning, until `out` is full."""
    done = 0
    while done < len(out):
        part = clip[start : start + len(out) - done]
        out[done : done + len(part)].copy_(part)
        done, start = done + len(part), 0
    return out


def _add_noise(waveform: Waveform, lowest_db: float, generator: torch.Generator) -> Waveform:
    ratio_db = _uniform(len(waveform), lowest_db, lowest_db + NOISE_RANGE_DB, generator).to(waveform.device)
    level = waveform.square().mean(1).sqrt() * 10 ** (-ratio_db / 20)
    noise = torch.randn(waveform.shape, generator=generator, dtype=waveform.dtype).to(waveform.device)
    return torch.addcmul(waveform, noise, level[:, None])


def _shares_by_loudness(waveform: Waveform, shift: int, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each clip's share of the target, and the weights of it and of the other clip.

    Beside a silent clip one is left alone: heard as loud as silence, nothing would be left of it."""
    loudness = torch.linalg.vector_norm(waveform, dim=1)
    silent = loudness < SILENCE * waveform.shape[1] ** 0.5
    loudness = loudness.clamp_min(1e-6)
    weight, other_weight = _loudness_weights(loudness, loudness.roll(shift), share)
    other_silent = silent.roll(shift)
    only_one, is_this = silent != other_silent, other_silent.to(share.dtype)
    share, weight = torch.where(only_one, is_this, share), torch.where(only_one, is_this, weight)
    return share, weight, torch.where(only_one, 1 - is_this, other_weight)


def _loudness_weights(loudness: Tensor, other_loudness: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Weighs two clips so that they are heard in the shares `share` and 1 - share (Tokozume 2018, equation 2).

    Loudness is that of the whole window; theirs is the loudest short part's, weighed as an ear does (A)."""
    part = 1 / (1 + loudness / other_loudness * (1 - share) / share.clamp_min(1e-6))
    norm = torch.sqrt(part.square() + (1 - part).square())  # keeps the power of two unrelated sounds
    return part / norm, (1 - part) / norm


def _replace_part(waveform: Waveform, other: Waveform, share: Tensor, generator: torch.Generator) -> Waveform:
    """Keeps `share` of each clip's samples, and plays the other clip for the rest of the time, in one piece."""
    place = (torch.arange(waveform.shape[1]) + 0.5) / waveform.shape[1]
    return torch.where(_gap(place, share, generator).to(waveform.device), other, waveform)


def _replace_band(
    waveform: Waveform, other: Waveform, share: Tensor, mel: MelConfig, generator: torch.Generator
) -> Waveform:
    """Keeps `share` of the frequencies that the spectrogram has of each clip, on HTK's mel scale, and plays the other
    clip's in the band that is left."""
    spectrum, other_spectrum = torch.fft.rfft(waveform), torch.fft.rfft(other)
    frequency_hz = torch.arange(spectrum.shape[1]) * mel.sample_rate_hz / waveform.shape[1]
    lowest, highest = math.log1p(mel.fmin_hz / 700), math.log1p(mel.top_hz / 700)
    place = (torch.log1p(frequency_hz / 700) - lowest) / (highest - lowest)
    spectrum = torch.where(_gap(place, share, generator).to(waveform.device), other_spectrum, spectrum)
    return torch.fft.irfft(spectrum, waveform.shape[1])


def _gap(place: Float[Tensor, " place"], share: Tensor, generator: torch.Generator) -> Bool[Tensor, "batch place"]:
    """Draws where in 0..1 each clip has a gap in one piece, which leaves `share` of it."""
    kept = share.cpu()
    start = _uniform(len(kept), 0, 1, generator) * kept
    return (place >= start[:, None]) & (place < (start + 1 - kept)[:, None])


def _interval(num_clips: int, length: int, widest: float, generator: torch.Generator) -> Bool[Tensor, "batch length"]:
    width = _uniform(num_clips, 0, widest * length, generator)
    start = _uniform(num_clips, 0, 1, generator) * (length - width)
    centre = torch.arange(length) + 0.5  # of a cell; by its edge the first one would never be masked
    return (centre >= start[:, None]) & (centre < (start + width)[:, None])


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Float[Tensor, " count"]:
    return low + (high - low) * torch.rand(count, generator=generator)


def _beta(count: int, alpha: float, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Draws from Beta(alpha, alpha), as the share of one of two Gamma(alpha) draws."""
    if alpha == 1.0:
        return torch.rand(count, generator=generator)
    shape = torch.full((2, count), alpha, dtype=torch.float64)  # a small alpha draws numbers that float32 does not hold
    first, second = torch._standard_gamma(shape, generator=generator)  # type: ignore[reportPrivateImportUsage]
    return (first / (first + second)).float()
