"""Files that have no good in them, and odd ones that have: each with what packing must make of it."""

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 8_000
PACKED = None
"""Expectation: it is a sound, however odd."""
UNREADABLE = "cannot be decoded"
TORN = "cannot be decoded|truncated|empty"


def tone(num_samples: int = 2_000, channels: int = 1) -> np.ndarray:
    samples = 0.5 * np.sin(np.arange(num_samples) * 0.3).astype(np.float32)
    return samples if channels == 1 else np.tile(samples[:, None], (1, channels))


def encoded(samples: np.ndarray, rate_hz: int = RATE_HZ, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    return file.getvalue()


def wav(data: bytes = b"", **lies: int) -> bytes:
    """A WAV of 16 bits whose header says what it is told to say."""
    data = data or (tone() * 32_767).astype("<i2").tobytes()
    said = {"size": len(data), "channels": 1, "rate_hz": RATE_HZ, "bits": 16, "format": 1, **lies}
    block = max(said["channels"] * said["bits"] // 8, 1)
    rate = said["rate_hz"]
    about = struct.pack(
        "<HHIIHH", said["format"], said["channels"], rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, said["bits"]
    )
    head = b"WAVEfmt " + struct.pack("<I", len(about)) + about + b"data" + struct.pack("<I", said["size"])
    return b"RIFF" + struct.pack("<I", (len(head) + said["size"]) & 0xFFFFFFFF) + head + data


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("../../escaped.wav", encoded(tone()))
    return file.getvalue()


def damaged_in_the_middle(sound: bytes) -> bytes:
    middle = len(sound) // 2
    return sound[:middle] + bytes(64) + sound[middle + 64 :]


def contents() -> dict[str, tuple[bytes, str | None]]:
    """Bytes by file name, and PACKED or the reason (a regular expression) why they are rejected."""
    whole = {kind: encoded(tone(8_000), kind=kind.upper()) for kind in ("wav", "flac", "ogg", "mp3")}
    noise = np.random.default_rng(0).bytes(4_000)
    found: dict[str, tuple[bytes, str | None]] = {
        "empty.wav": (b"", UNREADABLE),
        "text.wav": (b"this is a letter\n" * 99, UNREADABLE),
        "noise.wav": (noise, UNREADABLE),
        "zeros.wav": (bytes(4_000), UNREADABLE),
        "picture.wav": (b"\x89PNG\r\n\x1a\n" + noise, UNREADABLE),
        "archive.wav": (archive(), UNREADABLE),
        "program.wav": (b"\x7fELF" + noise, UNREADABLE),
        "script.wav": (b"#!/bin/sh\ntouch /tmp/pwned\n", UNREADABLE),
        "pickle.wav": (b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.", UNREADABLE),
        "only a tag.mp3": (b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10), TORN),
        "only a header.wav": (wav()[:44], TORN),
        "half a header.wav": (wav()[:30], UNREADABLE),
        "a header of ogg.ogg": (b"OggS" + noise, UNREADABLE),
        "a header of flac.flac": (b"fLaC" + noise, TORN),
        "no samples.wav": (encoded(np.zeros(0, np.float32)), "empty: holds no samples"),
        "says more.wav": (wav(size=1_000_000), r"truncated: \d+ of 1000000 bytes"),
        "says less.wav": (wav(size=1_000), PACKED),
        "says nothing.wav": (wav(size=0), "empty: holds no samples"),
        "no channels.wav": (wav(channels=0), UNREADABLE),
        "60000 channels.wav": (wav(channels=60_000), f"{UNREADABLE}|empty"),
        "two channels that are one.wav": (wav(channels=2), PACKED),
        "0 Hz.wav": (wav(rate_hz=0), UNREADABLE),
        "4 GHz.wav": (wav(rate_hz=4_000_000_000), f"{UNREADABLE}|cannot be kept as FLAC"),
        "no bits.wav": (wav(bits=0), UNREADABLE),
        "3 bits.wav": (wav(bits=3), f"{UNREADABLE}|empty|PACKED"),
        "24 bits that are 16.wav": (wav(bits=24), PACKED),
        "unknown format.wav": (wav(format=0x1234), UNREADABLE),
        "not a number.wav": (encoded(np.full(99, np.nan, np.float32), subtype="FLOAT"), "not finite"),
        "infinite.wav": (encoded(np.array([0.1, np.inf], np.float32), subtype="FLOAT"), "not finite"),
        "one bad channel.wav": (
            encoded(np.stack([tone(), np.full(2_000, -np.inf)], 1), subtype="DOUBLE"),
            "not finite",
        ),
        "1e300.wav": (encoded(np.full(99, 1e300), subtype="DOUBLE"), "not finite"),
        "beyond full scale.wav": (encoded(np.full(99, 15, np.float32), subtype="FLOAT"), PACKED),
        "far beyond full scale.wav": (
            encoded(np.full(99, 1e6, np.float32), subtype="FLOAT"),
            "holds samples as large as 1000000, where full scale is 1; divide",
        ),
        "silent.wav": (encoded(np.zeros(99, np.float32)), "silent: every sample is zero, as 16 bits of one channel"),
        "one sample.wav": (encoded(np.ones(1, np.float32)), PACKED),
        "two samples.flac": (encoded(np.ones(2, np.float32), kind="FLAC"), PACKED),
        "1 Hz.wav": (encoded(tone(), 1), "sampled at 1 Hz; a sound has 500 or more"),
        "384 kHz.wav": (encoded(tone(), 384_000), PACKED),
        "64 channels.wav": (encoded(tone(500, channels=64)), PACKED),
        "8 bits.wav": (encoded(tone(), subtype="PCM_U8"), PACKED),
        "24 bits.wav": (encoded(tone(), subtype="PCM_24"), PACKED),
        "32 bits.wav": (encoded(tone(), subtype="PCM_32"), PACKED),
        "float64.wav": (encoded(tone(), subtype="DOUBLE"), PACKED),
        "a-law.wav": (encoded(tone(), subtype="ALAW"), PACKED),
        "adpcm.wav": (encoded(tone(8_000), subtype="IMA_ADPCM"), PACKED),
        "aiff in disguise.wav": (encoded(tone(), kind="AIFF"), PACKED),
        "flac in disguise.wav": (whole["flac"], PACKED),
        "rf64.wav": (encoded(tone(), kind="RF64"), PACKED),
        "something behind it.wav": (whole["wav"] + noise, PACKED),
        "damaged flac.flac": (damaged_in_the_middle(whole["flac"]), TORN),
        "damaged ogg.ogg": (damaged_in_the_middle(whole["ogg"]), f"{TORN}|PACKED"),
        "damaged mp3.mp3": (damaged_in_the_middle(whole["mp3"]), f"{TORN}|PACKED"),
        "line\nbreak.wav": (whole["wav"], PACKED),
        "tab\tand bell\a.wav": (whole["wav"], PACKED),
        "it's \"quoted\", isn't it.wav": (whole["wav"], PACKED),
        "; rm -rf $HOME; `reboot`.wav": (whole["wav"], PACKED),
        "-rf.wav": (whole["wav"], PACKED),
        "..wav": (whole["wav"], PACKED),
        "Eule 🦉 сова フクロウ.wav": (whole["wav"], PACKED),
        "\u202egpj.wav": (whole["wav"], PACKED),
        "=cmd|' C'!A0.wav": (whole["wav"], PACKED),
        "[bold]%s {0} \\n.wav": (whole["wav"], PACKED),
        f"{'long ' * 49}.wav": (whole["wav"], PACKED),
        os.fsdecode(b"not utf-8 \xff\xfe.wav"): (whole["wav"], "its name is not UTF-8"),
    }
    for kind, sound in whole.items():
        for tenth in range(1, 10):
            reason = f"{TORN}|PACKED" if kind in ("mp3", "ogg") else TORN  # which know no length, or are read in pages
            found[f"{tenth} tenths.{kind}.{kind}"] = (sound[: len(sound) * tenth // 10], reason)
    return found


def things(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What has a sound's name and is no file at all."""
    return {
        "link to itself.wav": lambda path: path.symlink_to(path),
        "link to nothing.wav": lambda path: path.symlink_to(folder / "nowhere"),
        "link to a folder.wav": lambda path: path.symlink_to(folder),
        "endless.wav": lambda path: path.symlink_to("/dev/zero"),
        "pipe.wav": os.mkfifo,
        "folder.wav": lambda path: path.mkdir(),
    }
