"""What models said of clips that had not trained them: counted, averaged, ordered, and kept as a table."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import meamtm_command
from tiny import tiny

from meamtm.inference.ensemble import Part, parts_of
from meamtm.tables import print_ensemble
from meamtm.training.evaluate import Evaluation
from meamtm.training.metrics import confusion, scores
from meamtm.training.predictions import (
    Prediction,
    confusion_of,
    gather_predictions,
    read_predictions,
    score_predictions,
    write_predictions,
)
from meamtm.training.run import run_here

CLASSES = ("owl", "cat", "sea")


def said(
    clip_ids: list[str],
    probability: list[list[float]],
    target: list[list[float]],
    part: str = "fold 1",
    *,
    multi_label: bool = False,
) -> Evaluation:
    shares, wanted = np.array(probability, np.float32), np.array(target, np.float32)
    matrix = None if multi_label else confusion(torch.from_numpy(shares), torch.from_numpy(wanted)).numpy()
    return Evaluation(Path("x"), part, "0", CLASSES, {}, tuple(clip_ids), shares, wanted, matrix)


def scored(evaluation: Evaluation) -> Evaluation:
    """As a test gives it, with its metrics."""
    probability, target = torch.from_numpy(evaluation.probability), torch.from_numpy(evaluation.target)
    found = scores(probability, target, multi_label=evaluation.confusion is None)
    return replace(evaluation, metrics={f"test/{key}": value for key, value in found.items()})


def test_the_most_doubtful_come_first_with_what_all_models_said() -> None:
    owl, sea = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
    first = said(["a", "b"], [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], [owl, sea])
    second = said(["b", "a"], [[0.1, 0.3, 0.6], [0.8, 0.1, 0.1]], [sea, owl])
    other = said(["c"], [[0.9, 0.1, 0.0]], [sea], "fold 2")
    found = gather_predictions([first, second, other])
    assert [(each.clip, each.part, each.label, each.named) for each in found] == [
        ("c", "fold 2", "sea", "owl"),
        ("b", "fold 1", "sea", "sea"),
        ("a", "fold 1", "owl", "owl"),
    ]
    assert [(each.num_right, each.num_models) for each in found] == [(0, 1), (1, 2), (2, 2)]
    assert [each.confidence for each in found] == pytest.approx([0.0, 0.45, 0.7])
    assert found[1].probability == pytest.approx((0.15, 0.4, 0.45))


def test_metrics_of_the_mean_answers_are_those_of_each_fold_averaged() -> None:
    owl, sea = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
    first = said(["a", "b"], [[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]], [owl, sea])
    second = said(["a", "b"], [[0.4, 0.5, 0.1], [0.2, 0.1, 0.7]], [owl, sea])
    other = said(["c", "d", "e", "f"], [[0.9, 0.1, 0.0]] * 4, [owl, owl, owl, sea], "fold 2")
    found = score_predictions(gather_predictions([first, second, other]), CLASSES, multi_label=False)
    assert found["accuracy"] == pytest.approx((1 + 3 / 4) / 2), "each of the two is wrong of a clip, and not together"
    assert found["loss"] == pytest.approx(-(np.log([0.5, 0.55]).mean() + np.log([0.9, 0.9, 0.9, 1e-12]).mean()) / 2)


def test_copies_of_a_model_are_together_what_each_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """A fold counts as much as another, however many models it has; folds come in the order of their numbers."""
    owl, sea = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
    good = scored(said(["a", "b"], [owl, sea], [owl, sea], "fold 10"))
    bad = scored(said(["c", "d"], [sea, sea], [owl, sea], "fold 2"))
    evaluations = [good, bad, bad, bad]
    predictions = gather_predictions(evaluations)
    assert parts_of(evaluations, predictions) == [Part("fold 2", 2, 3, 0.5, 0.5), Part("fold 10", 2, 1, 1.0, 1.0)]
    assert confusion_of(predictions, CLASSES).tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 2]]
    print_ensemble(evaluations, predictions)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "one at a time: accuracy 0.7500, the mean over 2 parts of the data"
    assert lines[-1].startswith("together: accuracy 0.7500, macro_f1 ")
    print_ensemble([good, bad], gather_predictions([good, bad]))
    assert capsys.readouterr().out.splitlines()[-1].startswith("each part has one model, so nothing is averaged;")


def test_an_ensemble_of_several_labels_is_told_its_precision(capsys: pytest.CaptureFixture[str]) -> None:
    both, owl = [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]
    one = scored(said(["a", "b"], [[0.9, 0.1, 0.2], [0.3, 0.1, 0.4]], [both, owl], multi_label=True))
    two = scored(said(["a", "b"], [[0.9, 0.1, 0.8], [0.9, 0.1, 0.4]], [both, owl], multi_label=True))
    (part,) = parts_of([one, two], gather_predictions([one, two]))
    assert (part.alone, part.together) == (pytest.approx(0.875), 1.0)
    print_ensemble([one, two], gather_predictions([one, two]))
    assert "one at a time: map 0.8750" in capsys.readouterr().out


def test_metrics_of_mean_answers_of_several_labels() -> None:
    both, none = [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]
    one = said(["a", "b"], [[0.9, 0.4, 0.2], [0.2, 0.1, 0.3]], [both, none], multi_label=True)
    two = said(["a", "b"], [[0.7, 0.8, 0.4], [0.6, 0.1, 0.1]], [both, none], multi_label=True)
    found = score_predictions(gather_predictions([one, two]), CLASSES, multi_label=True)
    assert found["map"] == found["accuracy"] == 1.0
    truth = [0.8, 0.6, 0.7, 0.6, 0.9, 0.8]  # of each clip's labels
    assert found["loss"] == pytest.approx(-np.log(truth).sum() / 2)


def test_a_class_may_be_called_as_two_are() -> None:
    evaluation = said(["a", "b"], [[0.1, 0.1, 0.8], [0.7, 0.2, 0.1]], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    classes = ("owl", "cat", "owl;cat")
    found = gather_predictions([replace(evaluation, classes=classes)])
    assert score_predictions(found, classes, multi_label=False)["accuracy"] == 1.0


def test_of_several_labels_all_must_be_right_and_the_worst_answer_counts() -> None:
    evaluation = said(
        ["a", "b", "none"],
        [[0.9, 0.8, 0.3], [0.9, 0.4, 0.1], [0.1, 0.2, 0.05]],
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
        multi_label=True,
    )
    found = {each.clip: each for each in gather_predictions([evaluation])}
    assert (found["a"].label, found["a"].named, found["a"].num_right) == ("owl;cat", "owl;cat", 1)
    assert (found["b"].label, found["b"].named, found["b"].num_right) == ("owl;cat", "owl", 0)
    assert (found["none"].label, found["none"].named, found["none"].num_right) == ("", "", 1)
    assert [found[clip].confidence for clip in ("a", "b", "none")] == pytest.approx([0.7, 0.4, 0.8])


def test_any_name_is_read_back_as_it_was(tmp_path: Path) -> None:
    classes = ("label", 'rain, "heavy"', "犬\nB")
    wanted = [
        Prediction(name, "fold 1", classes[1], classes[2], 3, 0, 0.125, (0.5, 0.125, 0.375)) for name in ("a,b", "ü\n")
    ]
    write_predictions(tmp_path / "p.csv", wanted, classes)
    assert read_predictions(tmp_path / "p.csv") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    assert read_predictions(tmp_path / "none.csv") == []


def test_a_run_keeps_what_it_said_of_each_test_clip_and_evaluate_writes_the_same(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    outcome = run_here(tiny(packed, cache_dir, tmp_path, {"data.test_fold": 2}))
    evaluation = outcome.evaluation
    assert evaluation is not None
    kept = read_predictions(outcome.folder / "test" / "predictions.csv")
    assert {each.clip for each in kept} == set(evaluation.clip_ids)
    assert sum(each.num_right for each in kept) / len(kept) == pytest.approx(evaluation.metrics["test/accuracy"])
    assert [each.confidence for each in kept] == sorted(each.confidence for each in kept)
    assert meamtm_command("evaluate", outcome.folder, "--out", tmp_path / "p.csv").code == 0
    assert (tmp_path / "p.csv").read_bytes() == (outcome.folder / "test" / "predictions.csv").read_bytes()
    with (tmp_path / "p.csv").open() as file:
        assert next(csv.reader(file))[7:] == list(evaluation.classes)
    refused = meamtm_command("evaluate", outcome.folder, "--out", tmp_path / "none" / "p.csv")
    assert (refused.code, refused.out) == (2, "")
    assert "cannot be written; name a file in a folder that exists" in refused.err
