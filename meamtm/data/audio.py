"""One audio file -> mono int16 samples at the rate asked for, and back into FLAC.

Files are decoded in blocks, so that a long recording with many channels never lies in memory as floats. What cannot be
used is a DataError whose text is the reason alone; who knows the file's name adds it."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from meamtm.errors import DataError

BLOCK_FRAMES = 1 << 18
FULL_SCALE = 32_768
STREAMED_BYTES = 0x7FFF_F000
"""A WAV header that declares this much or more was written before its length was known."""


def read_audio(source: Path | bytes, sample_rate_hz: int | None = None) -> tuple[Int16[np.ndarray, " time"], int]:
    """Decodes a file, or the bytes of one, to mono at a rate (its own when None) and returns the rate with it.

    Channels are averaged; values beyond full scale are clipped. DataError says why a file cannot be used.
    """
    if isinstance(source, Path) and not source.is_file():
        raise DataError("no such file")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            rate_hz = sample_rate_hz or file.samplerate
            pieces = list(_decode(file, rate_hz))
            num_frames = file.tell()
            _check_whole(file, num_frames)
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
        raise DataError(f"cannot be decoded: {reason.strip().rstrip('.')}") from error
    if num_frames == 0:
        raise DataError("empty: holds no samples")
    waveform = np.concatenate(pieces)
    return _fit(waveform, resampled_length(num_frames, file.samplerate, rate_hz)), rate_hz


def resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Samples that a recording has at another rate, at least one."""
    return max(1, (num_samples * to_hz + from_hz // 2) // from_hz)


def encode_flac(waveform: Int16[np.ndarray, " time"], sample_rate_hz: int) -> bytes:
    """Packs mono samples losslessly; rates above 655,350 Hz do not exist in FLAC and are a DataError."""
    file = io.BytesIO()
    try:
        soundfile.write(file, waveform, sample_rate_hz, format="FLAC", subtype="PCM_16", compression_level=0.5)
    except soundfile.LibsndfileError as error:
        raise DataError(f"cannot be kept as FLAC at {sample_rate_hz} Hz: {error.error_string}") from error
    return file.getvalue()


def num_cores() -> int:
    """Cores that this process may use: as many threads decode at once, since decoding lets go of the interpreter."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_int16(waveform: Float32[np.ndarray, " time"]) -> Int16[np.ndarray, " time"]:
    """Rounds floats, full scale being 1, to 16 bits; 16-bit files come back exactly as they were."""
    scaled = waveform * np.float32(FULL_SCALE)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1, out=scaled).astype(np.int16)


def _decode(file: soundfile.SoundFile, rate_hz: int) -> Iterator[Int16[np.ndarray, " time"]]:
    """Yields mono blocks at the rate asked for."""
    if file.channels == 1 and file.subtype == "PCM_16" and file.samplerate == rate_hz:
        while len(block := file.read(BLOCK_FRAMES, dtype="int16")):
            yield block
        return
    stream = soxr.ResampleStream(file.samplerate, rate_hz, 1, dtype="float32") if file.samplerate != rate_hz else None
    while len(frames := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
        mono = frames[:, 0] if file.channels == 1 else frames.mean(axis=1, dtype=np.float32)  # (time,)
        if not np.isfinite(mono).all():
            raise DataError("holds samples that are not finite numbers")
        yield to_int16(stream.resample_chunk(mono) if stream else mono)
    if stream:
        yield to_int16(stream.resample_chunk(np.empty(0, np.float32), last=True))


def _check_whole(file: soundfile.SoundFile, num_frames: int) -> None:
    """Refuses a file that ends before its header says. MP3 headers only estimate, so they are not held to it."""
    if num_frames < file.frames and file.format != "MP3":
        raise DataError(f"truncated: {num_frames} of {file.frames} samples are there")
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
    if cut and int(cut[2]) < int(cut[1]) < STREAMED_BYTES:
        raise DataError(f"truncated: {cut[2]} of {cut[1]} bytes are there")


def _fit(waveform: Int16[np.ndarray, " time"], num_samples: int) -> Int16[np.ndarray, " num_samples"]:
    """Trims or zero-pads the sample or two by which a resampler's rounding differs from ours."""
    missing = num_samples - len(waveform)
    return np.pad(waveform, (0, missing)) if missing > 0 else waveform[:num_samples]
