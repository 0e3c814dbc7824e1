"""What a user gets wrong is told in one line: the key, the value, the rule and the remedy. Nothing is left behind."""

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import meamtm_command
from tiny import TINY

from meamtm.config import write_yaml
from meamtm.data.pack import pack
from meamtm.training.checkpoint import read_labels


@pytest.fixture(scope="module")
def place(packed: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with run.yaml, the packed sounds and a trained run, where commands are typed."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        shutil.copytree(packed, folder / "packed")
        places = {"data.path": "packed", "data.cache_dir": str(cache_dir)}
        write_yaml(folder / "run.yaml", {**TINY, **places, "train.epochs": 1, "name": "good"})
        assert meamtm_command("train", "run.yaml").code == 0
        yield folder


@pytest.fixture
def run_folder(place: Path) -> Path:
    """The trained run."""
    [folder] = (place / "runs").iterdir()
    return folder


@pytest.fixture
def nobody() -> int:
    """A port at which nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its size and when it changed."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found.items() if not path.is_dir()}


def assert_refused(message: str, *words: object) -> None:
    """Asserts that a command ends with 2, says one line and changes nothing in the folder where it is typed."""
    before, here = tree(Path.cwd()), sorted(Path.cwd().rglob("*"))
    code, out, err = meamtm_command(*words)
    assert code == 2, err
    assert re.fullmatch(f"meamtm: {message}\n", err), err
    assert out == ""
    assert (tree(Path.cwd()), sorted(Path.cwd().rglob("*"))) == (before, here)


@pytest.mark.parametrize("command", ["train", "show"])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", r"optim\.lrr=1: no such key; did you mean optim\.lr\?"),
        ("optim.lr", r"'optim\.lr' is not KEY=VALUE; write for example optim\.lr=3e-4"),
        (
            "train.epochs=many",
            (
                r"train\.epochs='many': input should be a valid integer, .*; "
                r"train\.epochs is: passes over the training clips \(default 60\)"
            ),
        ),
        (
            "train.epochs=0",
            r"train\.epochs=0: input should be greater than or equal to 1; train\.epochs is: passes over .*",
        ),
        (
            "encoder.width=100",
            r"encoder\.width=100 is not encoder\.heads x encoder\.head_dim \(2 x 8 = 16\); leave encoder\.width out .*",
        ),
        (
            "data.clip_s=0.02",
            r"data\.clip_s=0\.02 is shorter than one window \(mel\.window_ms=32\); lengthen the clip",
        ),
        ("mel.hop_ms=0.01", r"mel\.hop_ms=0\.01 is less than one sample at 8000 Hz; lengthen it"),
        ("mel.fmax_hz=9000", r"mel\.fmax_hz=9000 exceeds Nyquist \(4000 Hz\); lower it or raise mel\.sample_rate_hz"),
        ("data.valid_fold=1", r"data\.valid_fold=1 is data\.test_fold too, .*; take another fold"),
    ],
)
def test_a_setting_that_cannot_be(place: Path, command: str, word: str, message: str) -> None:
    assert_refused(message, command, "run.yaml", word)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.test_fold=9", r"data\.test_fold=9: .*packed has no such fold; choose one of 1, 2, 3, 4, 5, or null"),
        ("optim.name=adamx", r"optim\.name='adamx': timm cannot build it \(.*\); see timm\.optim\.list_optimizers\(\)"),
        ("mel.num_bands=200", r"mel\.num_bands=200: \d+ bands lie between two of the 129 frequency bins and .*"),
        (
            "data.path=elsewhere",
            r"data\.path=.*elsewhere: no packed data set there; make one with `meamtm pack SOURCE .*elsewhere`",
        ),
        (
            "data.path=gopher://a/b",
            r"data\.path=gopher://a/b: not a place that pyarrow can read \(.*\); correct the URI",
        ),
        pytest.param(
            "scale.device=cuda",
            r"scale\.device='cuda', but torch sees no CUDA device here; write scale\.device=auto or cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_run_that_cannot_begin(place: Path, word: str, message: str) -> None:
    assert_refused(message, "train", "run.yaml", "name=bad", word)


@pytest.mark.parametrize("command", ["train", "show"])
def test_a_config_file_that_is_not_there_or_no_yaml(place: Path, tmp_path: Path, command: str) -> None:
    assert_refused(
        r"none\.yaml: no such file; name an existing YAML file, for example one of configs/", command, "none.yaml"
    )
    (tmp_path / "torn.yaml").write_text("mel: [1, 2\nx: 1")
    assert_refused(r".*torn\.yaml line 2: not valid YAML \(.*\); correct it", command, tmp_path / "torn.yaml")
    assert_refused(r"packed: cannot be read as text \(.*\); name a YAML file", command, "packed")


def test_an_mlflow_that_does_not_answer(place: Path, nobody: int) -> None:
    uri = f"http://user:secret@127.0.0.1:{nobody}"
    message = rf"tracking\.uri=http://(?!.*secret).*127\.0\.0\.1:{nobody}.*; .*tracking\.mlflow=false.*"
    assert_refused(message, "train", "run.yaml", "name=bad", "tracking.mlflow=true", f"tracking.uri={uri}")


@pytest.mark.ray
def test_a_ray_cluster_that_does_not_answer(place: Path, nobody: int) -> None:
    address = f"127.0.0.1:{nobody}"
    message = (
        rf"scale\.address={re.escape(address)}: no Ray cluster answers there \(.*\); check host and port, "
        r"start one with `ray start --head`, or leave scale\.address and RAY_ADDRESS unset for one on this machine"
    )
    assert_refused(message, "train", "run.yaml", "name=bad", "scale.workers=1", f"scale.address={address}")


@pytest.mark.parametrize("command", ["evaluate", "predict", "embed"])
def test_what_is_no_checkpoint(place: Path, tmp_path: Path, command: str) -> None:
    more = {"evaluate": [], "predict": ["packed"], "embed": ["packed", "--out", tmp_path / "out.npz"]}[command]
    remedy = "; name a run's folder, like runs/NAME, or one of its checkpoints, runs/NAME/epoch-00100"
    for path in ("packed", "run.yaml"):
        assert_refused(rf"{re.escape(path)}: not a checkpoint \(no metrics\.json\){remedy}", command, path, *more)
    assert_refused(f"nothing: no such folder{remedy}", command, "nothing", *more)
    assert not (tmp_path / "out.npz").exists()


def test_embeddings_are_no_table(place: Path, run_folder: Path) -> None:
    assert_refused(
        r"--out=out\.csv: .* NumPy archive; .* ends in \.npz", "embed", run_folder, "packed", "--out", "out.csv"
    )


@pytest.mark.parametrize("name", ["config.yaml", "labels.json", "model.safetensors", "train_state.pt"])
def test_a_damaged_checkpoint(place: Path, run_folder: Path, tmp_path: Path, name: str) -> None:
    damaged = tmp_path / "epoch-00001"
    shutil.copytree(run_folder / "epoch-00001", damaged)
    (damaged / name).write_bytes((damaged / name).read_bytes()[:-9])
    assert_refused(
        rf".*epoch-00001: {name} is missing or damaged; use another checkpoint of the run", "evaluate", damaged
    )


def test_a_checkpoint_of_other_classes(place: Path, run_folder: Path, sounds: Path, tmp_path: Path) -> None:
    files = sorted((sounds / "audio").glob("*.wav"))[:10]
    rows = "".join(f"{path.name},{label}\n" for path, label in zip(files, "ab" * 5, strict=True))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    pack(sounds / "audio", tmp_path / "other", tmp_path / "list.csv")
    message = (
        r".* names 10 classes, \['tone', .*and .*other has 2, \['a', 'b'\]\.\.\.; evaluate on data with the same ones"
    )
    assert_refused(message, "evaluate", run_folder, "--data", tmp_path / "other")
    assert_refused(
        r"data\.test_fold=9: .* has no such fold; choose one of 1, 2, 3, 4, 5, .*", "evaluate", run_folder, "--fold", 9
    )


def test_a_data_set_that_was_packed_anew(place: Path, run_folder: Path, sounds: Path, tmp_path: Path) -> None:
    """Its name is the same, and so is the run's; the clips are not, and some of them may have been heard."""
    shutil.copytree(sounds, tmp_path / "fewer")
    *rows, _ = (tmp_path / "fewer" / "synth.csv").read_text().splitlines()
    (tmp_path / "fewer" / "synth.csv").write_text("\n".join(rows))
    pack(tmp_path / "fewer", tmp_path / "anew")
    (place / "packed").rename(tmp_path / "before")
    (tmp_path / "anew").rename(place / "packed")
    message = (
        r".*epoch-00001 was trained on other data than '.*packed' \(digest \w+, not \w+\); "
        r"set another name, or remove that run folder"
    )
    assert_refused(message, "train", "run.yaml")
    message = (
        r"data\.path=.*packed has changed since .*epoch-00001 was trained on it \(digest \w+, not \w+\); "
        r"name data that it has not heard with --data"
    )
    assert_refused(message, "evaluate", run_folder)
    (place / "packed").rename(tmp_path / "anew")
    (tmp_path / "before").rename(place / "packed")


def test_a_checkpoint_of_one_class(place: Path, run_folder: Path, tmp_path: Path) -> None:
    one = tmp_path / "epoch-00001"
    shutil.copytree(run_folder / "epoch-00001", one)
    assert len(read_labels(one).classes) == 10
    (one / "labels.json").write_text('{"classes": ["dog"], "multi_label": false, "digest": "0"}')
    record = json.loads((one / "metrics.json").read_text())
    record["files"]["labels.json"] = hashlib.sha256((one / "labels.json").read_bytes()).hexdigest()
    (one / "metrics.json").write_text(json.dumps(record))
    message = r".*epoch-00001: labels\.json names 1 class; a classifier has two or more"
    assert_refused(message, "predict", one, "packed")


def test_text_as_audio(place: Path, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is a text")
    message = r".*text\.wav: cannot be decoded: .*; name files with sound in them"
    assert_refused(message, "predict", run_folder, tmp_path / "text.wav")
    assert_refused(message, "embed", run_folder, tmp_path, "--out", "out.npz")


def test_text_as_audio_in_a_set_to_pack(place: Path, sounds: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for label, sound in zip("xy", sorted((sounds / "audio").glob("*.wav")), strict=False):
        (source / label).mkdir(parents=True)
        (source / label / "sound.wav").write_bytes(sound.read_bytes())
    (source / "x" / "text.wav").write_text("this is a text")
    message = r".*text\.wav: cannot be decoded: .*; correct or remove it, or pack without --strict"
    assert_refused(message, "pack", source, "out", "--strict")
    (source / "y" / "sound.wav").write_text("this is a text")
    message = r"2 of 3 files cannot be used, which leaves 1 classes of at least two; the first is .*text\.wav: .*"
    assert_refused(message, "pack", source, "out")


def test_a_csv_that_names_missing_files(place: Path, sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\ngone.wav,x\nlost.wav,y\n")
    words = ("pack", sounds / "audio", "out", "--manifest", tmp_path / "list.csv")
    assert_refused(
        r"2 of 2 files cannot be used, .*; the first is .*gone\.wav: no such file; correct the files or .*", *words
    )
    assert_refused(r".*gone\.wav: no such file; correct or remove it, or pack without --strict", *words, "--strict")


def test_a_label_file_with_one_class(place: Path, sounds: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted((sounds / "audio").glob("*.wav"))[:3]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *(f"{name},x" for name in names)]))
    message = r".*list\.csv: all clips have one class \(x\); label at least two classes"
    assert_refused(message, "pack", sounds / "audio", "out", "--manifest", tmp_path / "list.csv")


def test_a_source_or_target_that_cannot_be(place: Path, sounds: Path) -> None:
    assert_refused(r"SOURCE=nowhere: no such folder; name a folder with sounds in it", "pack", "nowhere", "out")
    message = r"OUT=runs: exists and is not a packed data set \(holds good-\w+\); name another folder"
    assert_refused(message, "pack", sounds, "runs")


def test_nothing_to_listen_to(place: Path, run_folder: Path, tmp_path: Path) -> None:
    message = r"none\.wav: no such file or folder; name audio files or folders of them"
    assert_refused(message, "predict", run_folder, "none.wav")
    assert_refused(
        rf"{tmp_path}: no \.flac, \.mp3, \.ogg, \.wav file in there; name another folder",
        "predict",
        run_folder,
        tmp_path,
    )


@pytest.mark.parametrize("command", ["predict", "embed"])
def test_an_answer_that_has_no_place_to_go(place: Path, run_folder: Path, sounds: Path, command: str) -> None:
    for out in ("nowhere/out.csv", "packed"):
        message = rf"--out={re.escape(out)}: cannot be written; name a file in a folder that exists"
        assert_refused(message, command, run_folder, sounds, "--out", out)


def test_a_good_run_is_not_refused(place: Path) -> None:
    """The same command that is refused above, with nothing wrong in it."""
    done = meamtm_command("train", "run.yaml", "name=bad")
    assert done.code == 0
    assert list(Path("runs").glob("bad-*"))
