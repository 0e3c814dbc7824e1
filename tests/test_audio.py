import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from meamtm.data.audio import BLOCK_SAMPLES, read_audio, resampled_length, to_flac, to_int16
from meamtm.errors import DataError


def tone(num_samples: int, rate_hz: int, frequency_hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(num_samples) / rate_hz).astype(np.float32)


def encoded(samples: np.ndarray, rate_hz: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    return file.getvalue()


FORMATS = [(kind, num_channels) for kind in ("wav", "flac", "ogg", "mp3") for num_channels in (1, 2, 6)]


@pytest.mark.parametrize(("kind", "num_channels"), [each for each in FORMATS if each != ("mp3", 6)])  # MP3 has two
def test_every_format_and_channel_count_becomes_the_same_mono_sound(
    tmp_path: Path, kind: str, num_channels: int
) -> None:
    path = tmp_path / f"tone.{kind}"
    soundfile.write(path, np.repeat(tone(16_000, 16_000)[:, None], num_channels, axis=1), 16_000)
    waveform, rate_hz = read_audio(path)
    assert rate_hz == 16_000
    assert waveform.dtype == np.int16
    assert len(waveform) == 16_000
    level = np.abs(np.fft.rfft(waveform * np.hanning(16_000)))
    assert level.argmax() == 440
    assert np.sqrt(np.mean((waveform / 32_768.0) ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)


def mp3(samples: np.ndarray, mode: str) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", 44_100, 1, "MPEG_LAYER_III", format="MP3", bitrate_mode=mode, compression_level=0.5
    ) as sound:
        sound.write(samples)
    return file.getvalue()


def without_length(sound: bytes) -> bytes:
    """An MP3 less its first frame, which holds no sound, as recorders write it that do not know the end."""
    return sound[sound.index(sound[:2], 4) :]


LOUD = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100).astype(np.float32)
QUIET = np.zeros(5 * 44_100, np.float32)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_its_length_is_read_whole(mode: str) -> None:
    sound = mp3(np.concatenate([QUIET, LOUD]), mode)
    assert len(read_audio(sound)[0]) == 6 * 44_100
    assert len(read_audio(without_length(sound))[0]) == pytest.approx(6 * 44_100, rel=0.01)
    assert len(read_audio(sound + b"TAG" + bytes(125))[0]) == 6 * 44_100


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("num_samples", [600, 1_200, 1_700, 2_400, 3_500, 4_700, 6_000, 9_000])
def test_a_short_mp3_whose_last_frame_is_padding_is_no_cut_one(num_samples: int, mode: str) -> None:
    assert len(read_audio(mp3(LOUD[:num_samples], mode))[0]) == num_samples


def test_an_mp3_that_is_known_by_its_suffix_alone_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    for before in (b"\xff", b"\xff\xe0", b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(400)):
        path.write_bytes(before + mp3(LOUD, "CONSTANT"))
        assert len(read_audio(path)[0]) == pytest.approx(44_100, abs=2_304)


@pytest.mark.parametrize(
    "sound",
    [
        without_length(mp3(np.concatenate([LOUD, QUIET]), "VARIABLE")),
        2 * mp3(LOUD, "CONSTANT"),
        mp3(LOUD, "CONSTANT") + b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + mp3(LOUD, "VARIABLE"),
    ],
    ids=["a guess from loud frames", "two joined", "two joined with a tag between"],
)
def test_an_mp3_that_libsndfile_would_cut_is_refused(sound: bytes) -> None:
    with pytest.raises(DataError, match=r"its header ends it after \d+ samples, and [2-9]\d % of its bytes come after"):
        read_audio(sound)
    with pytest.raises(DataError, match="write it anew"):
        to_flac(sound)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44_100, 16_000), (8_000, 16_000), (48_000, 22_050), (16_000, 16_000)])
def test_resampling_keeps_pitch_and_duration(from_hz: int, to_hz: int) -> None:
    waveform, rate_hz = read_audio(encoded(tone(2 * from_hz, from_hz), from_hz, "WAV", "FLOAT"), to_hz)
    assert rate_hz == to_hz
    assert len(waveform) == 2 * to_hz
    error = waveform[1_000:-1_000] / 32_768 - tone(2 * to_hz, to_hz)[1_000:-1_000]
    assert np.abs(error).max() < 1e-3


def test_a_path_and_its_bytes_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    path.write_bytes(encoded(tone(3_000, 8_000), 8_000, "FLAC"))
    np.testing.assert_array_equal(read_audio(path)[0], read_audio(path.read_bytes())[0])


def test_blocks_join_without_a_seam() -> None:
    length = 2 * BLOCK_SAMPLES + 123
    waveform, _ = read_audio(encoded(tone(length, 32_000, 50), 32_000, "WAV", "FLOAT"), 16_000)
    assert len(waveform) == resampled_length(length, 32_000, 16_000)
    np.testing.assert_allclose(waveform[100:-100] / 32_768, tone(len(waveform), 16_000, 50)[100:-100], atol=1e-3)


@given(st.lists(st.integers(-32_768, 32_767), min_size=1, max_size=300), st.sampled_from([8_000, 44_100, 655_350]))
def test_sixteen_bit_sounds_survive_flac_exactly(samples: list[int], rate_hz: int) -> None:
    waveform = np.array(samples, np.int16)
    flac = to_flac(encoded(waveform, rate_hz, "WAV"))
    back, back_hz = read_audio(flac.data)
    np.testing.assert_array_equal(back, waveform)
    assert (back_hz, flac.sample_rate_hz, flac.num_samples) == (rate_hz, rate_hz, len(samples))
    assert flac.digest == hashlib.sha256(waveform.data).hexdigest()
    assert flac.is_silent == (not waveform.any())


def test_floats_are_rounded_and_clipped() -> None:
    levels = np.array([0, 1.4 / 32_768, 1.6 / 32_768, 1, 7, -1, -7], np.float32)
    np.testing.assert_array_equal(to_int16(levels), [0, 1, 2, 32_767, 32_767, -32_768, -32_768])


@given(st.integers(1, 10**9), st.integers(1_000, 384_000), st.integers(1_000, 384_000))
def test_a_resampled_length_is_the_nearest_whole_number(num_samples: int, from_hz: int, to_hz: int) -> None:
    exact = num_samples * to_hz / from_hz
    assert abs(resampled_length(num_samples, from_hz, to_hz) - max(exact, 1)) <= 0.5 + 1e-6 * exact


@pytest.mark.parametrize("num_samples", [1, 2, 7])
def test_the_shortest_clips_are_read_at_any_rate(num_samples: int) -> None:
    sound = encoded(tone(num_samples, 44_100), 44_100, "WAV")
    assert len(read_audio(sound, 16_000)[0]) == resampled_length(num_samples, 44_100, 16_000)


def bad_files() -> dict[str, tuple[bytes, str]]:
    whole = encoded(tone(8_000, 8_000), 8_000, "WAV")
    flac = encoded(tone(30_000, 8_000), 8_000, "FLAC")
    return {
        "text": (b"this is a letter, not a sound\n" * 50, "cannot be decoded: .*[Ff]ormat not recognised"),
        "nothing": (b"", "cannot be decoded"),
        "no samples": (encoded(np.zeros(0, np.float32), 8_000, "WAV"), "empty: holds no samples"),
        "infinite": (encoded(np.array([0, np.inf], np.float32), 8_000, "WAV", "FLOAT"), "not finite numbers"),
        "not a number": (encoded(np.full((9, 2), np.nan, np.float32), 8_000, "WAV", "FLOAT"), "not finite numbers"),
        "half a WAV": (whole[: len(whole) // 2], r"truncated: \d+ of 16000 bytes are there"),
        "half a FLAC": (flac[: len(flac) // 2], "cannot be decoded|truncated"),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_a_bad_file_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    content, reason = bad_files()[kind]
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(DataError, match=reason):
            read_audio(source)
        with pytest.raises(DataError, match=reason):
            to_flac(source)


@pytest.mark.parametrize("name", ["missing.wav", "folder.wav", "headerless.raw"])
def test_what_is_no_sound_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "headerless.raw").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"no such file|not a file|cannot be decoded"):
        read_audio(tmp_path / name)


def test_a_path_of_windows_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^no such file; write / instead of \\$"):
        read_audio(tmp_path / "wren\\a.wav")


def test_a_streamed_wav_of_unknown_length_is_read() -> None:
    sound = bytearray(encoded(tone(8_000, 8_000), 8_000, "WAV"))
    at = sound.index(b"data")
    sound[4:8] = sound[at + 4 : at + 8] = b"\xff\xff\xff\xff"  # as written by ffmpeg into a pipe
    assert len(read_audio(bytes(sound))[0]) == 8_000


def test_rates_beyond_flac_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be kept as FLAC at 1000000 Hz"):
        to_flac(encoded(np.ones(10, np.int16), 1_000_000, "WAV"))
