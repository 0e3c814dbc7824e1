"""One audio file -> mono int16 samples at the rate asked for, or FLAC.

Files are decoded in blocks, so that a long recording with many channels never lies in memory as floats, and on its way
into FLAC not even as samples. What cannot be used is a DataError whose text is the reason alone; who knows the file's
name adds it."""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from meamtm.errors import DataError

BLOCK_SAMPLES = 1 << 18
"""Of all channels, decoded at once."""
LEAST_HZ = 500
"""A lower rate is a header that lies: seconds of it would become hours."""
FULL_SCALE = 32_768
LOUDEST = 16.0
"""24 dB beyond full scale are no recording: such floats were written as whole numbers are."""
LARGEST_BYTES = 1 << 31
"""Arrow counts the bytes of a value in 32 bits."""
REST_OF_MP3 = 0.05
"""Share of an MP3's bytes that may follow what was decoded."""
LARGEST_FRAME_BYTES = 1_441
"""Of an MP3: 320 kbit/s at 32 kHz."""
STREAMED_BYTES = 0x7FFF_F000
"""A WAV header that declares this much or more was written before its length was known."""


@dataclass(frozen=True)
class Flac:
    """A recording as packed: mono, lossless, at its own rate."""

    data: bytes
    sample_rate_hz: int
    num_samples: int
    digest: str
    """SHA-256 of the samples."""
    is_silent: bool


def read_audio(source: Path | bytes, sample_rate_hz: int | None = None) -> tuple[Int16[np.ndarray, " time"], int]:
    """Decodes a file, or the bytes of one, to mono at a rate (its own when None) and returns the rate with it.

    Channels are averaged; values beyond full scale are clipped. DataError says why a file cannot be used.
    """
    with _decoding(source) as file:
        rate_hz = sample_rate_hz or file.samplerate
        samples = bytearray()  # grows where it lies; a list of blocks would have to be joined into as much again
        for block in _blocks(file, rate_hz):
            samples += block.data
        num_samples = resampled_length(file.tell(), file.samplerate, rate_hz)
    return _fit(np.frombuffer(samples, np.int16), num_samples), rate_hz


def to_flac(source: Path | bytes) -> Flac:
    """Decodes a file to mono, and encodes it as FLAC, without ever holding its samples.

    DataError says why a file cannot be used, as `read_audio` does; rates above 655,350 Hz do not exist in FLAC.
    """
    out, state, num_samples, is_silent = io.BytesIO(), hashlib.sha256(), 0, True
    with _decoding(source) as file, _encoding(out, file.samplerate) as flac:
        for block in _blocks(file, file.samplerate):
            flac.write(block)
            state.update(block.data)
            num_samples += len(block)
            is_silent = is_silent and not block.any()
    if out.tell() >= LARGEST_BYTES:
        raise DataError(f"too long: {out.tell() / 2**30:.1f} GiB as FLAC, and a clip may take 2; cut it")
    return Flac(out.getvalue(), file.samplerate, num_samples, state.hexdigest(), is_silent)


def resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Samples that a recording has at another rate, at least one."""
    return max(1, (num_samples * to_hz + from_hz // 2) // from_hz)


def num_cores() -> int:
    """Cores that this process may use: as many threads decode at once, since decoding lets go of the interpreter."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_int16(waveform: Float32[np.ndarray, " time"]) -> Int16[np.ndarray, " time"]:
    """Rounds floats, full scale being 1, to 16 bits; 16-bit files come back exactly as they were."""
    scaled = waveform * np.float32(FULL_SCALE)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1, out=scaled).astype(np.int16)


@contextmanager
def _decoding(source: Path | bytes) -> Iterator[soundfile.SoundFile]:
    """Opens a sound file to be read to its end; what libsndfile cannot do with it is a DataError."""
    try:
        with _opened(source) as raw, _sound(source, raw) as file:
            if file.samplerate < LEAST_HZ:
                raise DataError(f"sampled at {file.samplerate} Hz; a sound has {LEAST_HZ} or more")
            yield file
            if file.format == "MP3" and file.name is raw:
                _check_rest(file, raw)
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
        raise DataError(f"cannot be decoded: {reason.strip().rstrip('.')}") from error


def _opened(source: Path | bytes) -> io.BufferedReader | io.BytesIO:
    """Opens a file, and not what might never end, as a pipe, or never begin, as links that lead to each other."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        if not source.is_file():
            hint = "; write / instead of \\" if "\\" in str(source) else ""
            raise DataError("not a file" if source.exists() else f"no such file{hint}")
        return source.open("rb")
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}") from error


def _sound(source: Path | bytes, raw: io.BufferedReader | io.BytesIO) -> soundfile.SoundFile:
    """Opens an MP3 so that Python sees how far it is read.

    Other files libsndfile opens by itself, since it would call Python for each 8 KB of a WAV, which takes a third
    longer; and so it does with an MP3 that it knows by its suffix alone, for what comes before the first frame.
    """
    if isinstance(source, bytes):
        return soundfile.SoundFile(raw)
    try:
        beginning = raw.read(3)
        raw.seek(0)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    if _begins_mp3(beginning):
        with suppress(soundfile.LibsndfileError):
            return soundfile.SoundFile(raw)
    return soundfile.SoundFile(str(source))


def _begins_mp3(beginning: bytes) -> bool:
    """Knows a tag, or the eleven bits that every frame begins with."""
    return beginning == b"ID3" or (beginning[:1] == b"\xff" and beginning[1:2] >= b"\xe0")


def _encoding(out: io.BytesIO, sample_rate_hz: int) -> soundfile.SoundFile:
    """Opens a FLAC file of one channel for writing."""
    kind = {"format": "FLAC", "subtype": "PCM_16", "compression_level": 0.5}
    try:
        return soundfile.SoundFile(out, "w", sample_rate_hz, 1, **kind)
    except soundfile.LibsndfileError as error:
        raise DataError(f"cannot be kept as FLAC at {sample_rate_hz} Hz: {error.error_string}") from error


def _blocks(file: soundfile.SoundFile, rate_hz: int) -> Iterator[Int16[np.ndarray, " time"]]:
    """Yields mono blocks at the rate asked for; DataError at the end if that came too early."""
    num_frames = max(BLOCK_SAMPLES // file.channels, 1)
    if file.channels == 1 and file.subtype == "PCM_16" and file.samplerate == rate_hz:
        while len(block := file.read(num_frames, dtype="int16")):
            yield block
    else:
        stream = (
            soxr.ResampleStream(file.samplerate, rate_hz, 1, dtype="float32") if file.samplerate != rate_hz else None
        )
        while len(frames := file.read(num_frames, dtype="float32", always_2d=True)):
            mono = frames[:, 0] if file.channels == 1 else frames.mean(axis=1, dtype=np.float32)  # (time,)
            if not np.isfinite(loudest := np.abs(mono).max()):
                raise DataError("holds samples that are not finite numbers")
            if loudest > LOUDEST:
                raise DataError(
                    f"holds samples as large as {loudest:.0f}, where full scale is 1; divide them by the full "
                    "scale that they were written for, such as 32768"
                )
            yield to_int16(stream.resample_chunk(mono) if stream else mono)
        if stream:
            yield to_int16(stream.resample_chunk(np.empty(0, np.float32), last=True))
    _check_whole(file, file.tell())


def _check_whole(file: soundfile.SoundFile, num_frames: int) -> None:
    """Refuses a file that ends before its header says. MP3 headers only estimate, so they are not held to it."""
    if num_frames == 0:
        raise DataError("empty: holds no samples")
    if num_frames < file.frames and file.format != "MP3":
        raise DataError(f"truncated: {num_frames} of {file.frames} samples are there")
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
    if cut and int(cut[2]) < int(cut[1]) < STREAMED_BYTES:
        raise DataError(f"truncated: {cut[2]} of {cut[1]} bytes are there")


def _check_rest(file: soundfile.SoundFile, raw: io.BufferedReader | io.BytesIO) -> None:
    """Refuses an MP3 that sounds on where libsndfile ends.

    It ends after the first of two that were joined, and too early where the bit rate varies, no header tells the
    length and the first frame, by which it is guessed, is larger than most. Of a constant rate the guess is 1 % too
    short at most, and a last frame of nothing but padding is never read.
    """
    num_read, beginning, size_bytes = raw.tell(), raw.read(3), raw.seek(0, os.SEEK_END)
    if _begins_mp3(beginning) and size_bytes - num_read > max(REST_OF_MP3 * size_bytes, 2 * LARGEST_FRAME_BYTES):
        percent = 100 * (size_bytes - num_read) // size_bytes
        raise DataError(
            f"its header ends it after {file.frames} samples, and {percent} % of its bytes come after them; "
            "write it anew, as FLAC or with ffmpeg -i OLD NEW.mp3"
        )


def _fit(waveform: Int16[np.ndarray, " time"], num_samples: int) -> Int16[np.ndarray, " num_samples"]:
    """Trims or zero-pads the sample or two by which a resampler's rounding differs from ours."""
    missing = num_samples - len(waveform)
    return np.pad(waveform, (0, missing)) if missing > 0 else waveform[:num_samples]
