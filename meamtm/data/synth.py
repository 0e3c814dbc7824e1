"""A seed -> the built-in sound set: ten classes of synthetic sounds, laid out as ESC-50 is.

Pitch, duration, timing, level, room and background overlap between classes, and a faint sound of another class often
plays along, so that neither loudness nor one frequency gives the answer away. Several takes of one source share its
pitch and timbre, and therefore its fold.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float, Float32
from scipy.signal import fftconvolve, lfilter

from meamtm.data.audio import to_int16
from meamtm.errors import DataError
from meamtm.files import whole_folder

NUM_FOLDS = 5
FORMAT = 1
Wave = Float[np.ndarray, " time"]


def write_synth(
    out: Path,
    *,
    clips_per_class: int = 40,
    clip_s: float = 2.0,
    sample_rate_hz: int = 16_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `audio/FOLD-SOURCE-TAKE-TARGET.wav` and `synth.csv`; the same settings again find them and do nothing.

    DataError when the settings make no set, or when `out` holds anything else.
    """
    _check(clips_per_class, clip_s, sample_rate_hz)
    settings = {
        "format": FORMAT,
        "clips_per_class": clips_per_class,
        "clip_s": clip_s,
        "sample_rate_hz": sample_rate_hz,
        "seed": seed,
    }
    rows = list(_rows(clips_per_class))
    if _is_there(out, settings, rows):
        return
    with whole_folder(out) as folder:
        (folder / "audio").mkdir()
        for done, row in enumerate(rows):
            waveform = _clip(row, round(clip_s * sample_rate_hz), sample_rate_hz, seed)
            soundfile.write(folder / "audio" / row.filename, to_int16(waveform), sample_rate_hz, subtype="PCM_16")
            if progress:
                progress(done + 1, len(rows))
        with (folder / "synth.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(Row))
            writer.writerows(astuple(row) for row in rows)
        (folder / "synth.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """One line of `synth.csv`."""

    filename: str
    fold: int
    target: int
    category: str
    src_file: int
    take: str


def _check(clips_per_class: int, clip_s: float, sample_rate_hz: int) -> None:
    if clips_per_class < NUM_FOLDS:
        raise DataError(
            f"clips_per_class={clips_per_class}: every class needs a clip in each of {NUM_FOLDS} folds; raise it"
        )
    if not 0.1 <= clip_s <= 60:
        raise DataError(f"clip_s={clip_s:g}: a clip lasts 0.1 to 60 s; choose a length in between")
    if not 4_000 <= sample_rate_hz <= 192_000:
        raise DataError(f"sample_rate_hz={sample_rate_hz}: the sounds need 4000 to 192000 Hz; choose a rate in between")


def _is_there(out: Path, settings: dict[str, int | float], rows: list[Row]) -> bool:
    """Whether `out` is this very set; DataError when it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        written = json.loads((out / "synth.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        written = None
    if written != settings:
        raise DataError(f"{out}: exists and is not this sound set; name another folder or move it away")
    missing = {row.filename for row in rows} - {path.name for path in (out / "audio").glob("*.wav")}
    if missing or not (out / "synth.csv").is_file():
        raise DataError(
            f"{out}: the sound set there is incomplete ({len(missing)} clips are missing); remove the folder"
        )
    return True


def _rows(clips_per_class: int) -> Iterator[Row]:
    """Deals each class's clips to folds; every second source has two takes."""
    source = 100_000
    for target, category in enumerate(SOUNDS):
        for fold, clips in enumerate(np.array_split(np.arange(clips_per_class), NUM_FOLDS), start=1):
            takes = [take for _ in clips for take in ("A", "B", "A")][: len(clips)]
            for take in takes:
                source += take == "A"
                yield Row(f"{fold}-{source}-{take}-{target}.wav", fold, target, category, source, take)


def _clip(row: Row, num_samples: int, rate_hz: int, seed: int) -> Float32[np.ndarray, " time"]:
    """One clip: the event, often a faint other event, a room, a background, a level."""
    source = np.random.default_rng((seed, row.src_file))  # what takes share
    take = np.random.default_rng((seed, row.src_file, ord(row.take)))  # what they do not
    clip = _event(row.category, num_samples, rate_hz, source, take)
    if take.random() < 0.5:
        other = [name for name in SOUNDS if name != row.category][take.integers(len(SOUNDS) - 1)]
        clip += _gain(take.uniform(-16, -7)) * _event(other, num_samples, rate_hz, take, take)
    clip = _room(clip, rate_hz, source)
    clip += _gain(-source.uniform(-2, 18)) * _unit(_coloured(num_samples, source.uniform(0, 2), take))
    return (_gain(take.uniform(-36, -15)) * _unit(clip)).astype(np.float32)


def _event(
    category: str, num_samples: int, rate_hz: int, source: np.random.Generator, take: np.random.Generator
) -> Wave:
    """A sound of one class somewhere in silence, at unit power over its own duration."""
    pitch_hz = _between(source, 150.0, min(2_000.0, rate_hz / 6))
    length = max(64, round(num_samples * take.uniform(0.35, 1.0)))
    start = take.integers(num_samples - length + 1)
    time_s = np.arange(length) / rate_hz
    sound = _unit(SOUNDS[category](time_s, pitch_hz * 2 ** take.uniform(-0.15, 0.15), source)) * _fade(length, rate_hz)
    return np.pad(sound, (start, num_samples - length - start))


def _tone(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    drift = 1 + 0.01 * rng.uniform(-1, 1) * np.sin(2 * np.pi * rng.uniform(0.1, 1) * time_s)
    return _sine(pitch_hz * drift, time_s) + 0.3 * rng.random() * _sine(2 * pitch_hz * drift, time_s)


def _chirp(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    octaves = rng.uniform(0.5, 2) * rng.choice([-1, 1])
    through = (time_s / time_s[-1] * rng.integers(1, 4)) % 1  # sweeps follow one another
    return _sine(pitch_hz * 2 ** (octaves * (through - 0.5)), time_s)


def _siren(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    swing = np.sin(2 * np.pi * rng.uniform(1, 4) * time_s + rng.uniform(0, 2 * np.pi))
    return _sine(pitch_hz * 2 ** (rng.uniform(0.2, 0.8) * swing), time_s)


def _am(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    swell = np.sin(2 * np.pi * rng.uniform(3, 14) * time_s + rng.uniform(0, 2 * np.pi))
    return (1 + rng.uniform(0.5, 1) * swell) * _sine(pitch_hz, time_s)


def _fm(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    wobble = np.sin(2 * np.pi * rng.uniform(15, 90) * time_s)
    return _sine(pitch_hz * (1 + rng.uniform(0.1, 0.4) * wobble), time_s)


def _clicks(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    ring_s = _between(rng, 0.003, 0.02)
    ring = np.exp(-time_s / ring_s) * _sine(2 * pitch_hz, time_s)
    return fftconvolve(_strokes(time_s, _between(rng, 3.0, 16.0), rng), ring[: max(16, len(ring) // 8)])[: len(time_s)]


def _noise_bursts(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    burst_s = _between(rng, 0.03, 0.2)
    window = np.hanning(max(8, round(burst_s * len(time_s) / time_s[-1])))
    envelope = fftconvolve(_strokes(time_s, _between(rng, 1.5, 6.0), rng), window)[: len(time_s)]
    return envelope * _band_noise(time_s, 2 * pitch_hz, _between(rng, 0.3, 0.9), rng)


def _plucked_string(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    """Karplus and Strong: a burst of noise runs around a delay line that dulls it."""
    rate_hz = (len(time_s) - 1) / time_s[-1]
    period = max(4, round(rate_hz / pitch_hz))
    pluck = np.zeros(len(time_s))
    for start in np.flatnonzero(_strokes(time_s, rng.uniform(0.8, 4), rng)):
        pluck[start : start + period] += rng.uniform(-1, 1, period)[: len(pluck) - start]
    loss = rng.uniform(0.97, 0.995)
    return _filter([1.0], [1.0, *[0.0] * (period - 1), -loss / 2, -loss / 2], pluck)


def _harmonic_stack(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    base_hz, num_harmonics = pitch_hz / 2, int(rng.integers(4, 9))
    vibrato = 1 + rng.uniform(0, 0.02) * np.sin(2 * np.pi * rng.uniform(3, 7) * time_s)
    levels = rng.uniform(0.2, 1, num_harmonics) / np.sqrt(np.arange(1, num_harmonics + 1))
    harmonics = [level * _sine(number * base_hz * vibrato, time_s) for number, level in enumerate(levels, start=1)]
    return np.sum(harmonics, axis=0)


def _wind(time_s: Wave, pitch_hz: float, rng: np.random.Generator) -> Wave:
    gusts = 0.2 + np.interp(time_s, np.linspace(0, time_s[-1], 8), rng.random(8))
    return gusts * _band_noise(time_s, 2 * pitch_hz, _between(rng, 0.3, 0.9), rng)


SOUNDS: dict[str, Callable[[Wave, float, np.random.Generator], Wave]] = {
    "tone": _tone,
    "chirp": _chirp,
    "siren": _siren,
    "am": _am,
    "fm": _fm,
    "clicks": _clicks,
    "noise_bursts": _noise_bursts,
    "plucked_string": _plucked_string,
    "harmonic_stack": _harmonic_stack,
    "wind": _wind,
}
"""The classes in order of their targets."""


def _sine(frequency_hz: Wave | float, time_s: Wave) -> Wave:
    """A sine of changing frequency: the phase is the integral of it."""
    step_s = time_s[1] - time_s[0]
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(frequency_hz, time_s.shape)) * step_s)


def _strokes(time_s: Wave, rate_hz: float, rng: np.random.Generator) -> Wave:
    """Impulses of uneven strength at uneven times; the first comes at once."""
    gaps_s = rng.uniform(0.6, 1.4, 2 + int(2 * rate_hz * time_s[-1])) / rate_hz
    times_s = np.concatenate([[0.0], np.cumsum(gaps_s)])
    times_s = times_s[times_s < time_s[-1]]
    train = np.zeros(len(time_s))
    train[np.searchsorted(time_s, times_s)] = rng.uniform(0.4, 1, len(times_s))
    return train


def _band_noise(time_s: Wave, centre_hz: float, damping: float, rng: np.random.Generator) -> Wave:
    """Noise through a resonance: the less damping, the narrower."""
    angle = 2 * np.pi * centre_hz * (time_s[1] - time_s[0])
    radius = 1 - damping * angle / 2
    return _filter([1.0], [1.0, -2 * radius * np.cos(angle), radius**2], rng.standard_normal(len(time_s)))


def _coloured(num_samples: int, slope: float, rng: np.random.Generator) -> Wave:
    """Noise whose power falls as frequency to the power of -slope: 0 is white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    return np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** (slope / 2), num_samples)


def _room(clip: Wave, rate_hz: int, rng: np.random.Generator) -> Wave:
    """A few decaying echoes and a tilt of the spectrum."""
    echoes = np.zeros(round(0.08 * rate_hz))
    echoes[0] = 1
    echoes[rng.integers(1, len(echoes), 6)] = rng.uniform(-0.4, 0.4, 6)
    return _filter([1.0, rng.uniform(-0.8, 0.8)], [1.0], fftconvolve(clip, echoes)[: len(clip)])


def _filter(numerator: list[float], denominator: list[float], wave: Wave) -> Wave:
    return np.asarray(lfilter(numerator, denominator, wave))


def _fade(length: int, rate_hz: int) -> Wave:
    """Ten milliseconds in and out."""
    steps = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
    return np.minimum(1, steps / (0.01 * rate_hz))


def _unit(wave: Wave) -> Wave:
    return wave / (np.sqrt(np.mean(wave**2)) + 1e-9)


def _gain(level_db: float) -> float:
    return 10 ** (level_db / 20)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """Log-uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
