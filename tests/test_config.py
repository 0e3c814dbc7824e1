"""Settings: one dotted key per knob, checked as a whole, signed by what can change a result."""

import ast
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import meamtm.config
from jobs.config import load_job
from meamtm.config import (
    RunConfig,
    describe,
    differences,
    flatten,
    from_flat,
    is_uri,
    known_keys,
    load,
    override,
    parse_changes,
    run_name,
    signature,
    write_yaml,
)
from meamtm.errors import ConfigError
from tune.plan import load_plan

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "signature.txt"

fractions = st.floats(0, 0.9)
valid_changes = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True),
        "data.path": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
        "data.clip_s": st.floats(2, 600),
        "data.test_fold": st.none() | st.integers(0, 3),
        "data.valid_fold": st.none() | st.integers(4, 9),
        "mel.sample_rate_hz": st.integers(8_000, 192_000),
        "mel.num_bands": st.integers(64, 512),
        "mel.window_ms": st.floats(25, 500),  # the shortest clip keeps enough frames, whichever kind frames it
        "mel.hop_ms": st.floats(1, 15),
        "mel.fmax_hz": st.none() | st.floats(100, 4_000),
        "mel.kind": st.sampled_from(["slaney", "htk", "kaldi"]),
        "mel.trainable": st.booleans(),
        "encoder.pretrained": st.sampled_from(["none", "deit_tiny_patch16_224", "weights/ast.pth"]),
        "encoder.stem": st.sampled_from(["conv", "patch"]),
        "encoder.stem_channels": st.lists(st.integers(8, 4_096), min_size=1, max_size=5),
        "encoder.patch": st.tuples(st.integers(16, 64), st.integers(16, 64)).map(list),
        "encoder.stride": st.tuples(st.integers(1, 16), st.integers(1, 16)).map(list),
        "encoder.heads": st.integers(1, 64),
        "encoder.pool": st.sampled_from(["mean", "cls", "cls_dist", "attention"]),
        "augment.noise_db": st.none() | st.floats(0, 80),
        "augment.time_mask": fractions,
        "mix.alpha": st.floats(0.01, 20),
        "optim.lr": st.floats(1e-9, 10),
        "optim.warmup": fractions,
        "train.seed": st.integers(0, 2**31 - 1),
        "scale.address": st.none() | st.text(st.characters(codec="utf-8"), max_size=12),
        "tracking.mlflow": st.booleans(),
    },
)

ANOTHER: dict[str, Any] = {
    "name": "other",
    "runs_dir": "elsewhere",
    "data.path": "data/esc10",
    "data.clip_s": 4.0,
    "data.test_fold": 3,
    "data.valid_fold": 2,
    "data.cache": "none",
    "data.cache_dir": "elsewhere",
    "mel.sample_rate_hz": 22_050,
    "mel.num_bands": 65,
    "mel.window_ms": 30.0,
    "mel.hop_ms": 10.0,
    "mel.fmin_hz": 50.0,
    "mel.fmax_hz": 7_000.0,
    "mel.kind": "htk",
    "mel.trainable": True,
    "mel.backend": "conv",
    "encoder.preset": "ast_base",
    "encoder.pretrained": "deit_tiny_patch16_224",
    "encoder.cnn": "resnet10t",
    "encoder.stem": "patch",
    "encoder.stem_channels": [32, 64],
    "encoder.stem_activation": "silu",
    "encoder.patch": [16, 17],
    "encoder.stride": [8, 16],
    "encoder.heads": 3,
    "encoder.head_dim": 32,
    "encoder.depth": 3,
    "encoder.mlp_ratio": 4.0,
    "encoder.attention": "locality",
    "encoder.pool": "cls",
    "encoder.dropout": 0.1,
    "encoder.drop_path": 0.2,
    "encoder.positions": "separate",
    "encoder.patchout": 0.3,
    "encoder.patchout_time": 0.3,
    "encoder.patchout_freq": 0.3,
    "augment.roll": 0.5,
    "augment.gain_db": 3.0,
    "augment.speed": 0.1,
    "augment.noise_db": 10.0,
    "augment.time_mask": 0.2,
    "augment.freq_mask": 0.2,
    "mix.kind": "mixup",
    "mix.prob": 0.5,
    "mix.until": 1.0,
    "mix.alpha": 0.4,
    "loss.label_smoothing": 0.0,
    "distill.teacher": "runs/esc10-*",
    "distill.weight": 0.9,
    "distill.temperature": 2.0,
    "distill.ensemble": True,
    "pretrain.epochs": 5,
    "pretrain.hidden": 0.4,
    "optim.name": "sgd",
    "optim.lr": 3e-4,
    "optim.weight_decay": 0.0,
    "optim.schedule": "step",
    "optim.warmup": 0.1,
    "optim.final_ratio": 0.1,
    "optim.step_epochs": 3,
    "optim.step_gamma": 0.1,
    "optim.clip_grad": 0.0,
    "optim.sam_rho": 0.05,
    "optim.mel_lr_scale": 0.01,
    "train.epochs": 7,
    "train.batch_size": 16,
    "train.epoch_batches": 5,
    "train.seed": 1,
    "train.ema_decay": 0.0,
    "train.recalibrate": False,
    "train.precision": "bf16",
    "train.keep": "best",
    "train.accumulation_steps": 2,
    "train.grad_checkpointing": True,
    "train.checkpoint_s": 0.0,
    "train.deterministic": True,
    "scale.workers": 2,
    "scale.device": "cpu",
    "scale.cpus_per_worker": 2.0,
    "scale.gpus_per_worker": 0.5,
    "scale.max_failures": 0,
    "scale.resize_s": 5.0,
    "scale.threads": 1,
    "scale.address": "auto",
    "tracking.mlflow": False,
    "tracking.uri": "http://127.0.0.1:5000",
    "tracking.experiment": "other",
}
"""A valid value for each key that is not its default."""

SAME_RUN = {
    "name",
    "runs_dir",
    "data.cache_dir",
    "train.checkpoint_s",
    "train.deterministic",
    "train.grad_checkpointing",
}
"""Keys that cannot change a result, besides all of scale and tracking."""

REFUSED = [
    (
        {"encoder.pool": "deit"},
        (
            "encoder.pool=deit has a head that learns from a teacher alone, and there is none; set distill.teacher, or "
            "encoder.pool=cls_dist"
        ),
    ),
    (
        {"encoder.cnn": "resnet18", "encoder.preset": "ast_base"},
        "encoder.preset=ast_base is for a transformer, and encoder.cnn=resnet18 takes its place; leave one of them out",
    ),
    (
        {"encoder.cnn": "resnet18", "encoder.pretrained": "a.pt"},
        "encoder.pretrained=a.pt is for a transformer, and encoder.cnn=resnet18 takes its place; leave one of them out",
    ),
    (
        {"encoder.cnn": "resnet18", "encoder.patchout": 0.5},
        "encoder.patchout=0.5 is for a transformer, and encoder.cnn=resnet18 takes its place; leave one of them out",
    ),
    (
        {"encoder.cnn": "resnet18", "pretrain.epochs": 9},
        (
            "pretrain.epochs=9 is for a transformer, which has patches to guess, and encoder.cnn=resnet18 takes its "
            "place; set pretrain.epochs=0"
        ),
    ),
    (
        {"encoder.cnn": "resnet18", "train.batch_size": 1},
        "train.batch_size=1 is a single clip, and encoder.cnn=resnet18 normalises over several; raise it",
    ),
    (
        {"encoder.cnn": "resnet18", "train.grad_checkpointing": True},
        (
            "train.grad_checkpointing=true computes layers twice, and batch norms of encoder.cnn=resnet18 would count "
            "clips twice; set it to false and raise train.accumulation_steps"
        ),
    ),
    (
        {"mel.fmax_hz": 9_000},
        "mel.fmax_hz=9000 exceeds Nyquist (8000 Hz); lower it or raise mel.sample_rate_hz",
    ),
    (
        {"mel.fmin_hz": 500, "mel.fmax_hz": 400},
        "mel.fmin_hz=500 is not below the highest band's edge (400 Hz); lower it",
    ),
    (
        {"mel.window_ms": 3, "mel.hop_ms": 1},
        "mel.window_ms=3 is 48 samples at 16000 Hz, fewer than 64; lengthen it",
    ),
    (
        {"mel.hop_ms": 0.03},
        "mel.hop_ms=0.03 is less than one sample at 16000 Hz; lengthen it",
    ),
    (
        {"mel.hop_ms": 40},
        "mel.hop_ms=40 exceeds mel.window_ms=32, so samples would go unheard; shorten the hop",
    ),
    (
        {"encoder.width": 192, "encoder.heads": 4, "encoder.head_dim": 64},
        (
            "encoder.width=192 is not encoder.heads x encoder.head_dim (4 x 64 = 256); "
            "leave encoder.width out and set those two"
        ),
    ),
    (
        {"encoder.preset": "ast_base", "encoder.patch": [16, 8]},
        ("encoder.patch=[16, 8] contradicts encoder.preset=ast_base, which has [16, 16]; leave one of them out"),
    ),
    (
        {"encoder.preset": "ast_base", "encoder.depth": 2},
        ("encoder.depth=2 contradicts encoder.preset=ast_base, which has 12; leave one of them out"),
    ),
    (
        {"encoder.stride": [16, 17]},
        "encoder.stride=[16, 17] must lie in 1..patch ([16, 16]) along frames; a larger stride skips frames",
    ),
    (
        {"encoder.stem_channels": [4, 64]},
        "encoder.stem_channels=[4, 64] must each lie in 8..4096; correct those outside",
    ),
    (
        {"encoder.attention": "separable", "encoder.pool": "cls"},
        (
            "encoder.pool=cls adds tokens that have no place on either axis, and encoder.attention=separable attends "
            "along axes; set encoder.pool=mean or attention"
        ),
    ),
    (
        {"encoder.attention": "separable", "encoder.patchout_time": 0.5},
        (
            "encoder.patchout_time=0.5 leaves holes in the grid along whose axes encoder.attention=separable attends; "
            "set encoder.patchout_time=0"
        ),
    ),
    (
        {"data.clip_s": 0.03},
        "data.clip_s=0.03 is shorter than one window (mel.window_ms=32); lengthen the clip",
    ),
    (
        {"scale.workers": [2, 1]},
        ("scale.workers=[2, 1] is not [least, most] with 1 <= least <= most; write for example scale.workers=[1, 4]"),
    ),
    (
        {"data.valid_fold": 1},
        "data.valid_fold=1 is data.test_fold too, so choices would be made on the test; take another fold",
    ),
    (
        {"data.clip_s": 0.2},
        (
            "encoder.stem_channels needs at least 16 bands x 16 frames, and a clip gives 64 x 9; "
            "raise mel.num_bands or data.clip_s, or shrink encoder.stem_channels"
        ),
    ),
    (
        {"encoder.stem": "patch", "mel.num_bands": 8},
        (
            "encoder.patch needs at least 16 bands x 16 frames, and a clip gives 8 x 201; "
            "raise mel.num_bands or data.clip_s, or shrink encoder.patch"
        ),
    ),
]


@given(valid_changes)
@settings(max_examples=200, deadline=None)
def test_from_flat_undoes_flatten(changes: dict[str, Any]) -> None:
    config = from_flat(changes)
    assert from_flat(flatten(config)) == config
    assert {key: flatten(config)[key] for key in changes} == changes
    assert override(RunConfig(), differences(config)) == config


@given(valid_changes)
@settings(max_examples=30, deadline=None)
def test_a_file_of_differences_gives_the_config_back(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    write_yaml(path, differences(from_flat(changes)), header="meamtm train run.yaml\nfast")
    assert load(path) == from_flat(changes)
    assert path.read_text().startswith("# meamtm train run.yaml\n# fast\n")
    assert [file.name for file in path.parent.iterdir()] == ["run.yaml"]


@given(valid_changes)
@settings(max_examples=50, deadline=None)
def test_a_yaml_word_on_the_command_line_is_a_change(changes: dict[str, Any]) -> None:
    words = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=9_999)}" for key, value in changes.items()]
    assert parse_changes(words) == changes


def test_keys_are_written_nested_or_dotted(tmp_path: Path) -> None:
    for text in ("mel: {hop_ms: 16}", "mel.hop_ms: 16", "mel:\n  hop_ms: 1.6e+1"):
        (tmp_path / "run.yaml").write_text(text)
        assert differences(load(tmp_path / "run.yaml")) == {"mel.hop_ms": 16.0}


def test_a_change_of_one_key_leaves_its_section_alone(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mel: {num_bands: 32, hop_ms: 10}")
    expected = {"mel.num_bands": 40, "mel.hop_ms": 10.0}
    assert differences(load(tmp_path / "run.yaml", {"mel.num_bands": 40})) == expected
    assert differences(load(tmp_path / "run.yaml", {"mel": {"num_bands": 40}})) == expected
    assert differences(override(load(tmp_path / "run.yaml"), {"mel": {"num_bands": 40}})) == expected


def test_checks_see_all_changes_at_once() -> None:
    low = override(RunConfig(), {"mel.fmax_hz": 4_000, "mel.sample_rate_hz": 8_000})
    both = {"mel.sample_rate_hz": 48_000, "mel.fmax_hz": 20_000}
    for order in (both, dict(reversed(both.items()))):
        assert override(low, order).mel.fmax_hz == 20_000
    with pytest.raises(ConfigError, match=r"mel\.fmax_hz=20000 exceeds Nyquist \(4000 Hz\)"):
        override(low, {"mel.fmax_hz": 20_000})


@pytest.mark.parametrize("claimed", [{"width": 96, "heads": 3}, {"width": "96", "heads": "03"}])
def test_width_is_accepted_where_it_agrees_and_never_stored(claimed: dict[str, Any]) -> None:
    changes = {f"encoder.{key}": value for key, value in claimed.items()}
    config = override(RunConfig(), changes | {"encoder.head_dim": 32})
    assert config.encoder.width == 96
    assert "encoder.width" not in flatten(config)


def test_a_claimed_width_hides_no_other_mistake() -> None:
    with pytest.raises(
        ConfigError, match=r"^encoder\.heads=None: input should be a valid integer; encoder\.heads is: "
    ):
        from_flat({"encoder.width": 256, "encoder.heads": None})


def test_a_section_whose_keys_are_all_commented_out_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("encoder:\n  # depth: 3\ntrain: {epochs: 7}\n")
    assert load(tmp_path / "run.yaml") == from_flat({"train.epochs": 7})
    assert load(tmp_path / "run.yaml", {"encoder.depth": 3}).encoder.depth == 3


def test_a_preset_fixes_an_architecture_from_a_file_or_in_an_override() -> None:
    for config in (from_flat({"encoder.preset": "ast_base"}), override(RunConfig(), {"encoder.preset": "ast_base"})):
        encoder = config.encoder
        assert (encoder.stem, encoder.patch, encoder.stride) == ("patch", (16, 16), (10, 10))
        assert (encoder.width, encoder.heads, encoder.depth, encoder.pool) == (768, 12, 12, "cls_dist")
        assert from_flat(flatten(config)) == config
    assert (
        from_flat({"encoder.preset": "ast_base", "encoder.width": 768, "encoder.drop_path": 0.2}).encoder.width == 768
    )


def test_what_a_preset_fixes_cannot_be_set_back_to_the_default(tmp_path: Path) -> None:
    """Two blocks are what a run has by default, and no preset's twelve."""
    (tmp_path / "ast.yaml").write_text("encoder: {preset: ast_base}")
    ast_base = load(tmp_path / "ast.yaml")
    message = r"encoder\.depth=2 contradicts encoder\.preset=ast_base, which has 12"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "ast.yaml", {"encoder.depth": 2})
    with pytest.raises(ConfigError, match=message):
        override(ast_base, {"encoder.depth": 2})
    assert override(ast_base, {"encoder.dropout": 0.1, "encoder.depth": 12}).encoder.depth == 12
    assert override(ast_base, {"encoder.preset": "none", "encoder.depth": 2}).encoder.depth == 2


def test_configs_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().mel.num_bands = 3  # type: ignore[misc]


def test_milliseconds_become_samples() -> None:
    mel = override(RunConfig(), {"mel.sample_rate_hz": 44_100, "mel.window_ms": 25, "mel.hop_ms": 10}).mel
    assert (mel.window_samples, mel.hop_samples, mel.num_fft, mel.top_hz) == (1102, 441, 2048, 22_050)
    assert override(RunConfig(), {"mel.fmax_hz": 7_000}).mel.top_hz == 7_000
    assert (RunConfig().clip_samples, RunConfig().num_frames) == (80_000, 201)


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message.split("=")[0] for _, message in REFUSED])
def test_values_that_do_not_fit_together_are_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        from_flat(changes)


def test_every_message_of_the_schema_is_pinned_above() -> None:
    room = Path(meamtm.config.__file__).parent
    trees = [ast.parse((room / name).read_text()) for name in ("schema.py", "mel.py", "encoder.py", "scale.py")]
    raised = [node.exc for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    patterns = [_pattern(error.args[0]) for error in raised if isinstance(error, ast.Call)]
    assert len(patterns) == len(raised) >= 11
    pinned = [message for _, message in REFUSED]
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, message) for message in pinned)] == []


def _pattern(message: ast.expr) -> str:
    """An f-string as a regular expression in which any value may stand."""
    assert isinstance(message, ast.JoinedStr)
    return "".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in message.values)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lrr", 3e-4, "optim.lrr=0.0003: no such key; did you mean optim.lr?"),
        ("mel.n_bands", 3, "mel.n_bands=3: no such key; did you mean mel.num_bands?"),
        ("epochs", 3, "epochs=3: no such key; did you mean pretrain.epochs or train.epochs?"),
        ("train.lr", 3, "train.lr=3: no such key; did you mean optim.lr?"),
        ("qqqqqqqq", 1, "qqqqqqqq=1: no such key; see `meamtm show`"),
        (
            "data.valid_fold",
            "None",
            "data.valid_fold='None': is a word here; none at all is null; data.valid_fold is: ",
        ),
        (
            "train.epochs",
            "many",
            (
                "train.epochs='many': input should be a valid integer, unable to parse string as an integer; "
                "train.epochs is: passes over the training clips (default 60)"
            ),
        ),
        (
            "encoder.heads",
            None,
            "encoder.heads=None: input should be a valid integer; encoder.heads is: attention heads",
        ),
        ("mix.alpha", 0.001, "mix.alpha=0.001: input should be greater than or equal to 0.01; mix.alpha is: "),
        ("train.epochs", 2.5, "train.epochs=2.5: input should be a valid integer, got a number with a fractional part"),
        (
            "optim.lr",
            -1,
            "optim.lr=-1: input should be greater than 0; optim.lr is: peak learning rate (default 0.002)",
        ),
        ("optim.lr", float("nan"), "optim.lr=nan: input should be a finite number; optim.lr is: peak learning rate"),
        (
            "encoder.pool",
            "max",
            (
                "encoder.pool='max': input should be 'mean', 'cls', 'cls_dist', 'deit' or 'attention'; "
                "encoder.pool is: how tokens become one vector; cls_dist: mean of two tokens of their own, as AST; "
                "deit: two with a head each, of which the second learns from distill.teacher alone (Touvron 2021) "
                "(default 'mean')"
            ),
        ),
        (
            "encoder.patch",
            [16, "x"],
            "encoder.patch.1='x': input should be a valid integer, unable to parse string as an integer; encoder.patch",
        ),
        ("scale.workers", -1, "scale.workers=-1: input should be greater than or equal to 0; scale.workers is: "),
        (
            "augment.noise_db",
            False,
            "augment.noise_db=False: is no number, and YAML reads on, off, yes and no so too; ",
        ),
        ("data.test_fold", False, "data.test_fold=False: is no number, and YAML reads on, off, yes and no so too; "),
        (
            "train.epochs",
            True,
            "train.epochs=True: is no number, and YAML reads on, off, yes and no so too; train.epochs",
        ),
        ("encoder.patch", [True, 16], "encoder.patch=[True, 16]: is no number"),
        ("tracking.mlflow", 3, "tracking.mlflow=3: input should be a valid boolean"),
        ("name", "a/b", "name='a/b': string should match pattern"),
        ("name", True, "name=True: input should be a valid string"),
        ("mel", 3, "mel=3: input should be a valid dictionary"),
    ],
)
def test_a_bad_key_or_value_is_named_with_rule_and_remedy(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        from_flat({key: value})


def test_three_mistakes_are_told_at_once_and_a_fourth_is_not() -> None:
    with pytest.raises(ConfigError) as caught:
        from_flat({"train.epochs": 0, "train.seed": -1, "optim.lr": 0, "optim.warmup": 2})
    assert str(caught.value).count("input should be") == 3


def test_a_key_is_a_value_or_a_section() -> None:
    with pytest.raises(
        ConfigError, match=r"^optim\.lr\.peak=1: optim has a value and keys below it; keep one of them$"
    ):
        from_flat({"optim": 2, "optim.lr.peak": 1})


def test_numbers_and_dates_are_good_names() -> None:
    assert from_flat({"name": 2024}).name == "2024"
    assert from_flat(parse_changes(["name=2026-11-27"])).name == "2026-11-27"
    assert from_flat({"optim.lr": "3e-4"}).optim.lr == 3e-4  # to YAML, 3e-4 without a point is a word


@pytest.mark.parametrize("name", ["1.10", "010", "0x10", "1_000", "1.5", "7", "1.0e-3", "1.0e-9", "0b11", "9" * 30])
def test_a_number_for_a_name_stays_as_it_is_written(name: str, tmp_path: Path) -> None:
    """Of these YAML makes 1.1, 8, 16, 1000 ..., so that two runs would share a folder."""
    config = from_flat(parse_changes([f"name={name}", f"runs_dir={name}", f"data.path={name}"]))
    assert (config.name, config.runs_dir, config.data.path) == (name, name, name)
    write_yaml(tmp_path / "run.yaml", differences(config))
    assert load(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("word", "value"),
    [("optim.lr=5.0e-4", 5e-4), ("optim.lr=0.0010", 1e-3), ("train.epochs=010", 10), ("train.epochs=1_000", 1_000),
     ("scale.workers=[01, 2]", [1, 2]), ("encoder.stride=[010, 10]", [10, 10])],
)  # fmt: skip
def test_a_number_is_read_however_it_is_written(word: str, value: Any) -> None:
    assert flatten(from_flat(parse_changes([word])))[word.partition("=")[0]] == value


def test_the_default_run_has_its_golden_signature() -> None:
    """A commit that changes the golden file says which default it changed, and why."""
    assert signature(RunConfig()) == GOLDEN.read_text().strip()
    assert run_name(RunConfig()) == f"run-{GOLDEN.read_text().strip()}"


def test_another_value_is_known_for_every_key() -> None:
    assert set(ANOTHER) == set(known_keys(RunConfig)) == set(flatten(RunConfig()))


SWITCHES = {"distill": "distill.teacher", "pretrain": "pretrain.epochs"}


@pytest.mark.parametrize("key", ANOTHER)
def test_a_key_changes_the_signature_if_it_can_change_the_result(key: str) -> None:
    changed = override(RunConfig(), {key: ANOTHER[key]})
    assert differences(changed)[key] == ANOTHER[key]
    assert len(differences(changed)) == 1 or key == "encoder.preset"
    is_same_run = key in SAME_RUN or key.startswith(("scale.", "tracking."))
    switch = SWITCHES.get(key.split(".", maxsplit=1)[0], key)  # without it the section does nothing
    assert (signature(changed) == signature(RunConfig())) is (is_same_run or switch != key)
    base = override(RunConfig(), {switch: ANOTHER[switch]} if switch != key else {})
    assert (signature(override(base, {key: ANOTHER[key]})) == signature(base)) is is_same_run


def test_where_a_data_set_lies_does_not_change_the_signature() -> None:
    def signed(path: str) -> str:
        return signature(override(RunConfig(), {"data.path": path}))

    assert signed("data/esc10") == signed("/mnt/data/esc10/") == signed("s3://bucket/esc10")
    assert signed("data/esc10") == signed("s3://bucket/esc10?endpoint_override=http://10.0.0.1:9000&scheme=http")
    assert signed("data/esc10") != signed("data/esc50")


def test_where_weights_to_begin_with_lie_does_not_change_the_signature() -> None:
    def signed(pretrained: str) -> str:
        return signature(override(RunConfig(), {"encoder.pretrained": pretrained}))

    assert signed("ast.pth") == signed("/mnt/weights/ast.pth") == signed("~/ast.pth")
    assert signed("weights/ast") == signed("/mnt/ast/") == signed("weights/ast/model.safetensors")
    names = ["none", "deit_tiny_patch16_224", "ast.pth", "weights/ast", "weights/vit/model.safetensors", "ast.pt"]
    assert len({signed(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("pretrained", "is_path"),
    [
        ("none", False),
        ("vit_tiny_patch16_224.augreg_in21k", False),
        ("deit.pth", True),
        ("deit.safetensors", True),
        ("./ast", True),
        ("/weights/ast.bin", True),
    ],
)
def test_weights_to_begin_with_are_a_path_or_a_name_of_timm(pretrained: str, is_path: bool) -> None:
    path = override(RunConfig(), {"encoder.pretrained": pretrained}).encoder.pretrained_path
    assert path == (Path(pretrained) if is_path else None)


def test_every_key_says_what_it_means() -> None:
    assert [key for key in known_keys(RunConfig) if not describe(RunConfig, key)] == []
    assert describe(RunConfig, "optim.nothing") == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mel: [1, 2\nx: 1", r"run\.yaml line 2: not valid YAML \(.*\); correct it"),
        ("- 1\n- 2", r"run\.yaml: holds a list, not keys and values; write KEY: VALUE lines"),
        ("train", r"run\.yaml: holds a str, not keys and values; write KEY: VALUE lines"),
        ("!!python/object/apply:os.getcwd []", r"run\.yaml line 1: not valid YAML \(could not determine a constructor"),
        (
            "a: &a [1]\nb: *a",
            r"run\.yaml line 2: not valid YAML \(\*a stands for a value; write it out\); correct it",
        ),
        ("a: &a [*a]", r"run\.yaml line 1: not valid YAML \(\*a stands for a value"),
        ("optim:\n  lr: 1\n  lr: 2", r"run\.yaml line 3: not valid YAML \(the key lr comes twice\); correct it"),
        ("space: {}", r"run\.yaml: space makes this the file of a study and not of a run; python -m tune .*run\.yaml "),
        (
            "kind: pack",
            r"run\.yaml: kind makes this the file of a job and not of a run; python -m jobs submit .*run\.y",
        ),
        ("optim.lr: 1\noptim: {lr: 2}", r"^optim\.lr=2: comes twice, nested and dotted; keep one of them$"),
        ("{" * 5_000, r"run\.yaml: not valid YAML \(too many brackets within each other\); correct it"),
        ("lr: {{ lr }}", r"run\.yaml line 1: not valid YAML \(a key is a word, not a list or mapping\); correct it"),
        ("a: \0", r"run\.yaml: not valid YAML \(unacceptable character .*\); correct it"),
        ("a: 1\n" + "#" * (1 << 20), r"run\.yaml: longer than 1,048,576 characters; settings are not"),
    ],
    ids=range(14),
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "run.yaml")


def test_a_file_that_stands_for_more_than_there_is_memory_is_refused_at_once(tmp_path: Path) -> None:
    """Nine lines of nine aliases each would be a billion words."""
    lines = ["a0: &a0 [lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    began_s = time.monotonic()
    with pytest.raises(ConfigError, match=r"run\.yaml line 2: not valid YAML \(\*a0 stands for a value"):
        load(tmp_path / "run.yaml")
    assert time.monotonic() - began_s < 1


@given(st.text(max_size=60) | st.from_regex(r"([a-z.]{1,6}: ?[\[{*&!|>'\"]{0,3}[a-z0-9]{0,3}\n){1,4}"))
def test_any_text_is_settings_or_a_config_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        with suppress(ConfigError):
            assert isinstance(load(path), RunConfig)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file; name an existing YAML file, for example one of"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read as text \(.*Is a directory.*\); name a YAML file"):
        load(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read as text \(.*\); name a YAML file"):
        load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        ("http://me:pl4nted@host:5000", "http://host:5000"),
        ("postgresql://me:a/b@c@host/runs", "postgresql://host/runs"),
        ("https://host/?token=pl4nted&x=1", "https://host/?token=&x=1"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_a_password_is_not_saved(tmp_path: Path, uri: str, kept: str) -> None:
    write_yaml(tmp_path / "run.yaml", flatten(override(RunConfig(), {"tracking.uri": uri})))
    assert load(tmp_path / "run.yaml").tracking.uri == kept


def test_an_at_sign_in_a_path_is_no_password(tmp_path: Path) -> None:
    for place, kept in {
        "s3://bucket/owl@night": "s3://bucket/owl@night",
        "s3://me:pl4nted@host/x": "s3://host/x",
    }.items():
        write_yaml(tmp_path / "run.yaml", {"data.path": place})
        assert load(tmp_path / "run.yaml").data.path == kept


@pytest.mark.parametrize("key", ["runs_dir", "data.cache_dir"])
def test_what_is_written_goes_to_a_folder(key: str) -> None:
    """Resolved, an address would become a folder of this name under the current one, which a job loses."""
    with pytest.raises(ConfigError, match=f"^{key}='s3://bucket/x': files are written there, .* name a folder"):
        override(RunConfig(), {key: "s3://bucket/x"})
    assert override(RunConfig(), {"data.path": "s3://bucket/x"}).data.path == "s3://bucket/x"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://bucket/x", True), ("GS://bucket/x", True), ("hdfs+ha://x", True), ("/://", False), ("a b://c", False)],
)
def test_a_uri_begins_with_its_scheme(path: str, expected: bool) -> None:
    assert is_uri(path) == expected
    if not expected:
        assert override(RunConfig(), {"runs_dir": path}).runs_dir == path


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing differs\n")
    assert load(tmp_path / "run.yaml") == RunConfig()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr", r"^'optim\.lr' is not KEY=VALUE; write for example optim\.lr=3e-4$"),
        ("=3", r"^'=3' is not KEY=VALUE"),
        ("encoder.patch=[1", r"^encoder\.patch=\[1: not a YAML value; quote it or check its brackets$"),
    ],
)
def test_a_word_that_is_no_change_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_changes([word])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_run_is_valid_and_opens_with_its_command(path: Path) -> None:
    assert differences(load(path))
    assert path.read_text().startswith(f"# meamtm train configs/{path.name}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "tune").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_study_is_valid_and_opens_with_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_plan(path).space.ranges
    assert f"python -m tune configs/tune/{path.name}" in path.read_text().partition("\n")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_job_is_valid_and_opens_with_its_command(path: Path) -> None:
    assert load_job(path).kind in ("train", "crossval", "tune", "nested", "pack")
    assert path.read_text().startswith(f"# python -m jobs submit configs/jobs/{path.name}")


def test_the_configs_were_found() -> None:
    assert (ROOT / "configs" / "esc10.yaml").is_file()
    assert (ROOT / "configs" / "tune" / "smoke.yaml").is_file()
    assert (ROOT / "configs" / "jobs" / "train.yaml").is_file()
