import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meamtm.config import DataConfig
from meamtm.data.clips import Clips
from meamtm.data.folds import assign_folds
from meamtm.data.sources import Entry
from meamtm.data.split import split_clips
from meamtm.errors import DataError


def with_columns(clips: Clips, **columns: list) -> Clips:
    """The same clips with other facts."""
    table = clips.table
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return replace(clips, table=table)


def choose(**keys: int | None) -> DataConfig:
    return DataConfig(path="sounds", **keys)


def test_folds_decide(clips: Clips) -> None:
    split = split_clips(clips, choose(test_fold=2, valid_fold=5))
    assert set(clips.folds[split.test]) == {2}
    assert set(clips.folds[split.valid]) == {5}
    assert set(clips.folds[split.train]) == {1, 3, 4}
    assert sorted(np.concatenate([split.train, split.valid, split.test])) == list(range(100))


def test_without_an_inner_fold_its_clips_train(clips: Clips) -> None:
    split = split_clips(clips, choose(test_fold=1, valid_fold=None))
    assert (len(split.train), len(split.valid), len(split.test)) == (80, 0, 20)
    split = split_clips(clips, choose(test_fold=None, valid_fold=None))
    assert (len(split.train), len(split.valid), len(split.test)) == (100, 0, 0)


def test_a_split_that_came_with_the_data_is_honoured(clips: Clips) -> None:
    names = ["train" if fold < 4 else "valid" if fold == 4 else "test" for fold in clips.folds]
    split = split_clips(with_columns(clips, split=names), choose(test_fold=1, valid_fold=None))
    assert set(clips.folds[split.train]) == {1, 2, 3}
    assert set(clips.folds[split.valid]) == {4}
    assert set(clips.folds[split.test]) == {5}


def test_a_class_of_which_no_clip_could_be_used_is_named(clips: Clips) -> None:
    targets = clips.targets.copy()
    targets[:, 2] = 0
    table = with_columns(clips, target=targets.tolist())
    with pytest.raises(
        DataError, match=rf"has no clip of the class {clips.classes[2]}, of which none could be used .*"
    ):
        split_clips(table, choose(test_fold=1, valid_fold=None))


@pytest.mark.parametrize("key", ["test_fold", "valid_fold"])
def test_a_fold_that_does_not_exist_names_those_that_do(key: str, clips: Clips) -> None:
    message = rf"data\.{key}=9: sounds has no such fold; choose one of 1, 2, 3, 4, 5, or null"
    with pytest.raises(DataError, match=message):
        split_clips(clips, choose(**{"test_fold": 1, "valid_fold": 2, key: 9}))


def test_a_class_without_a_training_clip_is_refused(clips: Clips) -> None:
    is_wind = clips.targets[:, clips.classes.index("wind")] == 1
    folds = np.where(is_wind, 1, np.maximum(clips.folds, 2)).tolist()
    with pytest.raises(DataError, match=r"no training clip has the class wind \(data\.test_fold=1, .*hold out another"):
        split_clips(with_columns(clips, fold=folds), choose(test_fold=1))


def test_a_set_of_two_folds_that_are_both_held_out_leaves_nothing_to_train_on(clips: Clips) -> None:
    two = with_columns(clips, fold=np.where(clips.folds > 2, 2, clips.folds).tolist())
    with pytest.raises(DataError, match=r"no clip is left to train on with .*_fold=1 and .*_fold=2 held out; set"):
        split_clips(two, choose(test_fold=1, valid_fold=2))


def test_a_group_that_would_be_heard_on_both_sides_is_refused(clips: Clips) -> None:
    groups = clips.table.column("group").to_pylist()
    torn = int(np.flatnonzero(clips.folds == 3)[0])
    groups[torn] = groups[0]  # of fold 1
    with pytest.raises(
        DataError, match=r"group=100001 would be heard in training and in a test; give its clips one fold"
    ):
        split_clips(with_columns(clips, group=groups), choose(test_fold=1))
    both_train = split_clips(with_columns(clips, group=groups), choose(test_fold=5))
    assert {0, torn} <= set(both_train.train.tolist())


@settings(max_examples=30)
@given(st.data())
def test_no_group_is_in_two_parts_whatever_the_folds(clips: Clips, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 30), min_size=100, max_size=100))
    labels = clips.targets.argmax(axis=1).tolist()
    entries = [
        Entry(name, Path("a.wav"), (str(label),), str(number))
        for name, label, number in zip(clips.ids, labels, numbers, strict=True)
    ]
    folds = [entry.fold for entry in assign_folds(entries)]
    made = with_columns(clips, fold=folds, group=list(map(str, numbers)))
    test_fold, valid_fold = data.draw(st.permutations([*sorted(set(folds)), None]))[:2]
    try:
        split = split_clips(made, choose(test_fold=test_fold, valid_fold=valid_fold))
    except DataError as error:
        assert re.search("no training clip has the class|no clip is left to train on", str(error))  # noqa: PT017
        return
    parts = [set(np.array(numbers)[part].tolist()) for part in (split.train, split.valid, split.test)]
    assert sum(map(len, parts)) == len(set(numbers))
