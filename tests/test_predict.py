"""Files in, one answer per file out; what cannot be read is answered with the reason."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from meamtm.config import from_flat
from meamtm.errors import DataError
from meamtm.inference.predict import (
    Answer,
    check_any,
    classify_files,
    classify_samples,
    classify_windows,
    embed_files,
    find_audio,
    write_csv,
    write_npz,
)
from meamtm.model.transformer import AudioTransformer
from meamtm.tables import print_answers
from meamtm.training.checkpoint import Labels, Saved

RATE_HZ = 8_000
CLASSES = ("bell", "café, open", "dog")


@pytest.fixture(scope="module")
def saved() -> Saved:
    """A model of half a second that no training has touched; its head tells clips apart."""
    return made(multi_label=False)


def made(
    *, multi_label: bool, precision: str = "float32", seed: int = 0, changes: dict[str, float] | None = None
) -> Saved:
    config = from_flat(
        {
            "train.precision": precision,
            "data.clip_s": 0.5,
            "mel.sample_rate_hz": RATE_HZ,
            "mel.num_bands": 16,
            "encoder.stem_channels": [8],
            "encoder.heads": 1,
            "encoder.head_dim": 8,
            "encoder.depth": 1,
            **(changes or {}),
        }
    )
    torch.manual_seed(seed)
    model = AudioTransformer(config, len(CLASSES)).eval()
    for parameter in model.encoder.head.parameters():
        torch.nn.init.normal_(parameter)
    return Saved(Path("none"), config, Labels(CLASSES, multi_label, "0"), model, {})


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples).astype(np.float32)


def write(path: Path, waveform: np.ndarray, rate_hz: int = RATE_HZ) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate_hz, subtype="PCM_16")
    return path


def heard(answers: Iterable[Answer]) -> list[np.ndarray]:
    """The numbers of answers that all have some."""
    values = [answer.values for answer in answers if answer.values is not None]
    assert values
    return values


def expected(saved: Saved, waveform: np.ndarray) -> np.ndarray:
    """The model's own answer to samples as a 16-bit file holds them."""
    samples = torch.from_numpy(np.rint(waveform * 32_768).astype(np.float32) / 32_768)[None]
    with torch.inference_mode():
        return saved.model(samples).float().softmax(1)[0].numpy()


def test_audio_is_found_in_files_and_folders_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b/2.wav", "b/1.FLAC", "b/deep/er/3.ogg", "b/notes.txt", "b/4.mp3", "a.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = ["a.dat", "b/1.FLAC", "b/2.wav", "b/4.mp3", "b/deep/er/3.ogg"]  # a file that is named is always tried
    assert find_audio([tmp_path / "a.dat", tmp_path / "b"]) == [tmp_path / name for name in names]


def test_nothing_to_hear_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.wav: no such file or folder; name audio files or folders of them$"):
        find_audio([tmp_path / "none.wav"])
    with pytest.raises(DataError, match=r": no \.flac, \.mp3, \.ogg, \.wav file in there; name another folder$"):
        find_audio([tmp_path])


def test_a_file_of_the_trained_length_is_answered_by_the_model_itself(saved: Saved, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(4_000))
    [answer] = classify_files(saved, [path])
    assert (answer.path, answer.problem) == (path, "")
    [values] = heard([answer])
    np.testing.assert_allclose(values, expected(saved, noise(4_000)), atol=1e-6)
    assert values.sum() == pytest.approx(1, abs=1e-6)


def test_a_long_file_is_the_mean_of_windows_that_cover_it(saved: Saved, tmp_path: Path) -> None:
    [answer] = heard(classify_files(saved, [write(tmp_path / "a.wav", noise(10_000))]))
    windows = [noise(10_000)[start : start + 4_000] for start in (0, 3_000, 6_000)]
    np.testing.assert_allclose(answer, np.mean([expected(saved, part) for part in windows], axis=0), atol=1e-6)


def test_each_window_of_a_file_is_answered_with_its_times(saved: Saved, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "long.wav", noise(10_000)),
        write(tmp_path / "short.wav", noise(700)),
        tmp_path / "text.wav",
    ]
    paths[2].write_text("text")
    long, short, text = classify_windows(saved, paths)
    assert [answer.span_s for answer in long] == [(0, 0.5), (0.5, 1.0), (0.75, 1.25)]
    for values, start in zip(heard(long), (0, 4_000, 6_000), strict=True):
        np.testing.assert_allclose(values, expected(saved, noise(10_000)[start : start + 4_000]), atol=1e-6)
    assert [answer.span_s for answer in short] == [(0, 700 / RATE_HZ)]
    write_csv(tmp_path / "out.csv", Labels(CLASSES, False, "digest"), [*long, *short, *text])
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "start_s", "end_s", "class", *CLASSES, "problem"]
    assert [(row["start_s"], row["end_s"]) for row in rows] == [
        ("0.000", "0.500"),
        ("0.500", "1.000"),
        ("0.750", "1.250"),
        ("0.000", "0.087"),
        ("", ""),
    ]
    assert [bool(row["class"]) for row in rows] == [True] * 4 + [False]


def test_files_are_heard_in_the_precision_that_tests_are_made_in(saved: Saved, tmp_path: Path) -> None:
    low = made(multi_label=False, precision="bf16")
    [answer] = heard(classify_files(low, [write(tmp_path / "a.wav", noise(4_000))]))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(answer, expected(low, noise(4_000)), atol=1e-6)
    assert not np.allclose(answer, expected(saved, noise(4_000)), atol=1e-6)


def test_a_file_a_little_longer_than_a_window_is_heard_in_its_middle(saved: Saved, tmp_path: Path) -> None:
    """As evaluation hears it."""
    [answer] = heard(classify_files(saved, [write(tmp_path / "a.wav", noise(4_200))]))
    np.testing.assert_allclose(answer, expected(saved, noise(4_200)[100:4_100]), atol=1e-6)


def test_a_short_file_is_padded_with_silence(saved: Saved, tmp_path: Path) -> None:
    [answer] = heard(classify_files(saved, [write(tmp_path / "a.wav", noise(700))]))
    np.testing.assert_allclose(answer, expected(saved, np.pad(noise(700), (0, 3_300))), atol=1e-6)


def test_a_file_of_many_windows_is_heard_to_its_end(saved: Saved, tmp_path: Path) -> None:
    """40 windows, more than are computed at once; all of them silent but the last."""
    sound = np.concatenate([np.zeros(39 * 4_000, np.float32), noise(4_000)])
    [answer] = heard(classify_files(saved, [write(tmp_path / "a.wav", sound)]))
    silence, last = expected(saved, np.zeros(4_000, np.float32)), expected(saved, noise(4_000))
    np.testing.assert_allclose(answer, (39 * silence + last) / 40, atol=1e-6)


def test_files_of_any_rate_and_channels_are_heard(saved: Saved, tmp_path: Path) -> None:
    time_s = np.arange(44_100 // 2) / 44_100
    tone = 0.3 * np.sin(2 * np.pi * 440 * time_s).astype(np.float32)
    low_tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(4_000) / RATE_HZ).astype(np.float32)
    stereo = write(tmp_path / "stereo.flac", np.stack([tone, tone], axis=1), 44_100)
    [answer] = heard(classify_files(saved, [stereo]))
    np.testing.assert_allclose(answer, expected(saved, low_tone), atol=0.02)


@pytest.mark.parametrize("num_samples", [900, 12_000, 40_000], ids=["short", "some windows", "many"])
def test_a_sound_in_memory_is_answered_as_in_a_file(saved: Saved, tmp_path: Path, num_samples: int) -> None:
    sound = np.round(noise(num_samples) * 2**15) / 2**15  # which 16 bits hold
    for rate_hz in (RATE_HZ, 11_025):
        (in_file,) = heard(classify_files(saved, [write(tmp_path / "a.wav", sound, rate_hz)]))
        integers = ((sound * 2**15).astype(np.int16), (sound.astype(np.float64) * 2**31).astype(np.int32))
        swapped = [each.astype(each.dtype.newbyteorder(">")) for each in (sound, *integers)]
        for samples in (sound, sound.astype(np.float64), *integers, *swapped):
            np.testing.assert_array_equal(classify_samples(saved, samples, rate_hz), in_file)
    ensemble = [saved, made(multi_label=False, seed=1)]
    mean = np.mean([classify_samples(each, sound, RATE_HZ) for each in ensemble], axis=0)
    np.testing.assert_allclose(classify_samples(ensemble, sound, RATE_HZ), mean)
    with pytest.raises(DataError, match=r"^samples: "):
        classify_samples(saved, sound[:0], RATE_HZ)
    for other in (sound[None], sound.astype(np.int64), sound.astype(np.uint8), sound.astype(complex)):
        with pytest.raises(
            DataError, match=r"^samples: \w+ of shape \(.*\); give one channel, as floats in -1..1, int16"
        ):
            classify_samples(saved, other, RATE_HZ)


def test_one_file_that_cannot_be_read_leaves_the_others_answered(saved: Saved, tmp_path: Path) -> None:
    paths = [write(tmp_path / "1.wav", noise(4_000)), tmp_path / "2.wav", write(tmp_path / "3.wav", noise(4_000, 3))]
    paths[1].write_text("this is a text")
    first, text, last = classify_files(saved, paths)
    assert text.values is None
    assert text.problem.startswith("cannot be decoded: ")
    assert first.values is not None
    assert last.values is not None
    assert not np.array_equal(first.values, last.values)


def test_several_labels_get_probabilities_of_their_own(tmp_path: Path) -> None:
    several = made(multi_label=True)
    [answer] = heard(classify_files(several, [write(tmp_path / "a.wav", noise(4_000))]))
    samples = torch.from_numpy(np.rint(noise(4_000) * 32_768).astype(np.float32) / 32_768)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(answer, several.model(samples).sigmoid()[0], atol=1e-6)


def test_several_models_answers_are_averaged_and_what_none_can_read_stays_told(saved: Saved, tmp_path: Path) -> None:
    other = made(multi_label=False, seed=1)
    paths = [write(tmp_path / "a.wav", noise(4_000)), write(tmp_path / "long.wav", noise(10_000)), tmp_path / "b.wav"]
    paths[2].write_text("text")
    first, _, text = classify_files([saved, other], paths)
    each = [expected(model, noise(4_000)) for model in (saved, other)]
    assert np.abs(each[0] - each[1]).max() > 0.01
    np.testing.assert_allclose(heard([first])[0], np.mean(each, axis=0), atol=1e-6)
    assert (text.path, text.values) == (paths[2], None)
    assert text.problem.startswith("cannot be decoded: ")

    _, windows, [text] = classify_windows([saved, other], paths)
    assert (text.values, text.span_s) == (None, None)
    assert [answer.span_s for answer in windows] == [(0, 0.5), (0.5, 1.0), (0.75, 1.25)]
    for values, start in zip(heard(windows), (0, 4_000, 6_000), strict=True):
        part = noise(10_000)[start : start + 4_000]
        np.testing.assert_allclose(values, np.mean([expected(model, part) for model in (saved, other)], 0), atol=1e-6)


@pytest.mark.parametrize(("key", "mine", "its"), [("data.clip_s", 0.5, 0.25), ("mel.sample_rate_hz", 8_000, 16_000)])
def test_windows_that_differ_are_not_averaged_but_files_are(
    saved: Saved, tmp_path: Path, key: str, mine: float, its: float
) -> None:
    path = write(tmp_path / "a.wav", noise(10_000))
    other = made(multi_label=False, changes={key: its}, seed=1)
    with pytest.raises(
        DataError, match=rf"--each-window: none has {key}={mine}, and none {its}, so their windows differ; leave --each"
    ):
        classify_windows([saved, other], [path])
    each = [heard(classify_files(model, [path]))[0] for model in (saved, other)]
    [answer] = heard(classify_files([saved, other], [path]))
    np.testing.assert_allclose(answer, np.mean(each, axis=0), atol=1e-6)


def test_embeddings_are_as_wide_as_the_encoder_and_tell_sounds_apart(saved: Saved, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{seed}.wav", noise(9_000, seed)) for seed in (0, 0, 1)]
    first, again, other = heard(embed_files(saved, paths))
    assert first.shape == (8,)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_a_csv_has_a_line_for_every_file(saved: Saved, tmp_path: Path) -> None:
    paths = [write(tmp_path / 'a, "b".wav', noise(4_000)), tmp_path / "text.wav"]
    paths[1].write_text("text")
    answers = list(classify_files(saved, paths))
    write_csv(tmp_path / "out.csv", Labels(CLASSES, False, "digest"), answers)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        good, bad = csv.DictReader(file)
    assert list(good) == ["path", "class", *CLASSES, "problem"]
    assert good["path"] == str(paths[0])
    [values] = heard(answers)
    assert good["class"] == CLASSES[int(values.argmax())]
    assert [float(good[name]) for name in CLASSES] == pytest.approx(values.tolist(), abs=1e-6)
    assert bad == {"path": str(paths[1]), "class": "", **dict.fromkeys(CLASSES, ""), "problem": answers[1].problem}


def test_where_a_clip_may_have_several_labels_all_above_one_half_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [[0.9, 0.8, *[0.1] * (len(CLASSES) - 2)], [0.2] * len(CLASSES)]
    answers = [Answer(Path(f"{number}.wav"), np.array(row, np.float32)) for number, row in enumerate(values)]
    labels = Labels(CLASSES, True, "digest")
    write_csv(tmp_path / "out.csv", labels, answers)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == [f"{CLASSES[0]};{CLASSES[1]}", ""]
    print_answers(answers, labels)
    shown = capsys.readouterr().out
    assert f"{CLASSES[0]};{CLASSES[1]}" in shown
    assert "0.900 0.800" in shown


def test_an_npz_has_the_readable_files_alone(saved: Saved, tmp_path: Path) -> None:
    paths = [tmp_path / "text.wav", write(tmp_path / "a.wav", noise(4_000))]
    paths[0].write_text("text")
    answers = list(embed_files(saved, paths))
    assert write_npz(tmp_path / "out.npz", answers) == 1
    with np.load(tmp_path / "out.npz") as found:  # without pickle, which is NumPy's default
        assert found["path"].tolist() == [str(paths[1])]
        assert np.array_equal(found["embedding"], heard(answers))


def test_nothing_that_can_be_read_is_an_error(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("text")
    [text, missing, good] = classify_files(
        saved, [tmp_path / "text.wav", tmp_path / "none.wav", write(tmp_path / "a.wav", noise(4_000))]
    )
    with pytest.raises(DataError, match=r"text\.wav: cannot be decoded: .*[^)]; name files with sound in them$"):
        check_any([text])
    with pytest.raises(DataError, match=r"none\.wav: no such file \(nor can the other 1 files be used\); name files"):
        check_any([missing, text])
    check_any([text, missing, good])
