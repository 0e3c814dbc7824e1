"""A study file becomes a plan whose every suggestion builds a run, or one clear line."""

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meamtm.config import build, flatten, signature
from meamtm.errors import ConfigError
from tune.plan import load_plan
from tune.space import Range, Space, decode, encode

STUDY = {
    "set": {"data.valid_fold": 2, "train.epochs": 5},
    "space": {
        "optim.lr": {"log_uniform": [1e-4, 1e-2]},
        "optim.step_gamma": {"uniform": [0.1, 0.9], "when": {"optim.schedule": "step"}},
        "optim": {"schedule": {"choice": ["cosine", "step", "constant"]}},
        "encoder.heads": {"int": [1, 4]},
        "encoder.stem": {"choice": ["conv", "patch"]},
        "encoder.stem_channels": {"choice": [[16, 32], [16, 32, 64]], "when": {"encoder.stem": "conv"}},
        "mix.alpha": {"uniform": [0.2, 2.0], "when": {"optim.schedule": ["cosine", "constant"]}},
    },
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


@pytest.mark.parametrize("name", ["what?", "100%"])
def test_a_place_that_no_uri_can_hold_is_refused(path, tmp_path, name):
    """Optuna would write its database elsewhere."""
    with pytest.raises(ConfigError, match=r"studies_dir=.*: Optuna's database cannot lie in .*; put studies elsewhere"):
        load_plan(path, [f"studies_dir={tmp_path / name}"])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_point_builds_a_run_and_conditional_keys_keep_their_conditions(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    plan = load_plan(path)
    point = plan.space.draw(random.Random(seed))  # noqa: S311
    run = flatten(plan.trial(3, point))
    assert {key: run[key] for key in point} == point
    assert ("optim.step_gamma" in point) == (point["optim.schedule"] == "step")
    assert ("mix.alpha" in point) == (point["optim.schedule"] != "step")
    assert ("encoder.stem_channels" in point) == (point["encoder.stem"] == "conv")
    for key, value in point.items():
        assert plan.space.ranges[key].contains(value)
    base = flatten(plan.base)
    elsewhere = {"name", "runs_dir", *point}
    assert {key: run[key] for key in run if key not in elsewhere} == {
        key: base[key] for key in base if key not in elsewhere
    }


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), st.lists))
def test_encoded_choices_come_back_as_they_were(value):
    if not (isinstance(value, str) and value.startswith("json:")):
        assert decode(encode(value)) == value


def test_keys_are_asked_after_those_in_their_conditions():
    ranges = {
        "c": build(Range, {"choice": ["x"], "when": {"b": 1}}),
        "b": build(Range, {"int": [1, 2], "when": {"a": True}}),
        "a": build(Range, {"choice": [True, False]}),
    }
    space = Space(ranges)
    assert list(space.ranges) == ["a", "b", "c"]
    assert space.parents("c") == {"a": True, "b": 1}
    assert not space.active("b", {"a": 1}), "1 is a number and True is none"


def test_the_study_has_one_identity_however_long_it_runs(path):
    plan = load_plan(path)
    same = [
        "trials=99",
        "max_concurrent=1",
        "time_budget_s=5",
        "studies_dir=/elsewhere",
        "scale.workers=2",
        "asha.reduction=2",
    ]
    assert {load_plan(path, [word]).signature for word in same} == {plan.signature}
    other = [
        "seed=1",
        "train.epochs=6",
        "objective=valid/loss",
        "limits.max_params=9999999",
        "start=[{optim.lr: 1e-3}]",
    ]
    changed = {load_plan(path, [word]).signature for word in other}
    changed.add(load_changed(path, "space.optim.lr={log_uniform: [1e-4, 2e-2]}").signature)
    assert len(changed | {plan.signature}) == 7


def test_the_study_file_beside_the_results_is_the_same_study(path, tmp_path):
    plan = load_plan(
        path,
        [f"studies_dir={tmp_path}", "start=[{optim.lr: 1e-3, encoder.stem: conv, encoder.stem_channels: [16, 32]}]"],
    )
    plan.write()
    again = load_plan(plan.folder / "study.yaml")
    assert again.name == plan.name
    assert again.config.model_dump(exclude={"set", "base"}) == plan.config.model_dump(exclude={"set", "base"})
    assert again.base == plan.base


def test_trials_of_equal_values_have_folders_of_their_own(path):
    plan = load_plan(path)
    first, second = plan.trial(0, {}), plan.trial(1, {})
    assert signature(first) == signature(second)
    assert first.name != second.name


def test_words_of_a_run_change_the_base_and_words_of_a_study_the_study(path):
    plan = load_plan(
        path, ["trials=12", "train.epochs=7", "encoder.heads=2", "asha.grace_epochs=2", "space.encoder.heads=null"]
    )
    assert (plan.config.trials, plan.base.train.epochs, plan.config.asha.grace_epochs) == (12, 7, 2)
    assert plan.base.encoder.heads == 2
    assert "encoder.heads" not in plan.space.ranges


def test_a_range_is_changed_from_the_command_line(path):
    tree = yaml.safe_load(path.read_text())
    tree["space"]["optim.warmup"] = {"uniform": [0.0, 0.1], "when": {"optim.schedule": "cosine"}}
    path.write_text(yaml.safe_dump(tree))
    ranges = load_plan(path, ["space.optim.warmup.choice=[0.0, 0.2]", "space.optim.lr.uniform=[0.1, 0.2]"]).space.ranges
    assert ranges["optim.lr"].uniform == (0.1, 0.2)
    assert ranges["optim.warmup"].choice == (0.0, 0.2)
    assert ranges["optim.warmup"].when == {"optim.schedule": "cosine"}, "where a key is searched stays as it was"
    added = load_plan(path, ["space.optim.clip_grad.uniform=[0.5, 2]"]).space.ranges["optim.clip_grad"]
    assert added.uniform == (0.5, 2.0)
    with pytest.raises(
        ConfigError, match=r"space\.optim\.lr: give exactly one of .* \(there is log_uniform, uniform\)"
    ):
        load_plan(path, ["space.optim.lr.uniform=[0.1, 0.2]", "space.optim.lr.log_uniform=[0.1, 0.2]"])


def load_changed(path, *words):
    """Loads the study with some keys changed, those of its space in the file."""
    tree = yaml.safe_load(path.read_text())
    others = []
    for word in words:
        key, _, text = word.partition("=")
        section, _, searched = key.partition(".")
        if section == "space" and text != "null":
            tree["space"][searched] = yaml.safe_load(text)
        else:
            others.append(word)
    path.write_text(yaml.safe_dump(tree))
    return load_plan(path, others)


WRONG = [
    ("trails=3", "trails=3: no such key of a study or a run; did you mean trials?"),
    ("epochs=3", "epochs=3: no such key of a study or a run; did you mean pretrain.epochs or train.epochs?"),
    ("train.epoch=3", "train.epoch=3: no such key of a study or a run; did you mean train.epochs?"),
    ("trials=0", "trials=0: input should be greater than or equal to 1"),
    ("limits.max_param=3", "limits.max_param=3: no such key; did you mean limits.max_params?"),
    ("space.optim.lrr={uniform: [0, 1]}", "space.optim.lrr: no such key of a run; did you mean optim.lr?"),
    (
        "space.optim.lr={log_uniform: [1, 100]}",
        "space.optim.lr: 100.0 builds no run: optim.lr=100.0: input should be less",
    ),
    (
        "space.optim.lr={uniform: [1, 0]}",
        "space.optim.lr: uniform=.*: the lowest value comes first and is below the highest",
    ),
    ("space.optim.lr={log_uniform: [0, 1]}", "space.optim.lr: log_uniform=.*: a logarithm needs values above 0"),
    ("space.optim.lr={log_uniform: [0.1, x]}", "space.optim.lr: log_uniform.1='x': input should be a valid number"),
    (
        "space.optim.lr={uniform: [0.1, 1], choice: [1]}",
        "space.optim.lr: give exactly one of log_uniform, uniform, int, choice",
    ),
    ("space.optim.lr=4", "space.optim.lr=4: not a range; give one of log_uniform"),
    ("space.encoder.heads={choice: []}", "space.encoder.heads: choice=.. offers nothing"),
    ("space.encoder.heads={int: [0, 2]}", "space.encoder.heads: 0 builds no run: encoder.heads=0"),
    ("space.mel.fmax_hz={choice: [9000]}", "space.mel.fmax_hz: 9000 builds no run: mel.fmax_hz=9000 exceeds Nyquist"),
    (
        "space.optim.warmup={uniform: [0, 0.1], when: {optim.name: lamb}}",
        "optim.name is not searched, so the condition never",
    ),
    (
        "space.mix.alpha={uniform: [1, 2], when: {optim.schedule: stp}}",
        "optim.schedule never has that value .cosine, step",
    ),
    ("space.optim.schedule={choice: [step], when: {optim.step_gamma: 1}}", "refer to each other in a circle; drop one"),
    ("space.data.test_fold={choice: [1, 2]}", "space.data.test_fold: trials that differ in it cannot be compared"),
    ("space.scale.workers={choice: [1, 2]}", "space.scale.workers: trials that differ in it cannot be compared"),
    ("optim.lr=0.1", "optim.lr=0.1: optim.lr is searched here; to fix it, add space.optim.lr=null"),
    ("set.optim.lr=0.1", "set.optim.lr=0.1: optim.lr is searched here; to fix it, add space.optim.lr=null"),
    (
        "start=[{optim.lr: 3}]",
        r"start.0..optim.lr=3: outside its range .0.0001, 0.01.; widen the range or move the point",
    ),
    ("start=[{optim.l: 3}]", r"start.0..optim.l=3: optim.l is not searched; did you mean optim.lr?"),
    ("start=[{optim.step_gamma: 0.5}]", "exists only with optim.schedule='step'; add that to the point"),
    ("start=7", "start=7: input should be a valid tuple"),
    ("data.valid_fold=1", "data.valid_fold=1 is data.test_fold too"),
]


@pytest.mark.parametrize(("word", "message"), WRONG)
def test_a_wrong_study_gets_one_clear_line(path, word, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_changed(path, word)
    assert "\n" not in str(error.value)


def test_the_config_of_a_run_is_no_study():
    with pytest.raises(ConfigError, match=r"esc10\.yaml: data is a setting of a run, .* below set:, or, .* `base: "):
        load_plan(Path(__file__).parents[1] / "configs" / "esc10.yaml")


def test_a_study_without_a_space_is_refused(tmp_path):
    (tmp_path / "empty.yaml").write_text("name: empty\nset: {data.valid_fold: 2}\n")
    with pytest.raises(
        ConfigError, match=r"empty.yaml: space is empty, so nothing is searched; add for example optim.lr"
    ):
        load_plan(tmp_path / "empty.yaml")


def test_a_corner_that_needs_other_values_beside_it_is_fine(path):
    """Eight bands are too few for the base run's stem of four stages, and enough for one of two."""
    plan = load_changed(
        path,
        "encoder.stem=conv",
        "space.encoder.stem=null",
        "space.encoder.stem_channels={choice: [[8, 8], [8, 8, 8, 8]]}",
        "space.mel.num_bands={choice: [8, 64]}",
    )
    assert plan.space.ranges["mel.num_bands"].corners() == (8, 64)
