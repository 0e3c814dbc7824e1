"""What workers report into a run's folder reaches every sink once, and is kept where a sink cannot take it."""

import errno
from pathlib import Path

import pytest
from tiny import Record

from meamtm.tracking import Metrics
from meamtm.training.notes import REPORTS, following, is_told_to_stop, leave_report, stop_sign


class FullDisk(Record):
    """A sink that has room for one line."""

    def log(self, metrics: Metrics, step: int) -> None:
        if self.rows:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().log(metrics, step)


def test_reports_are_told_once_and_in_order(tmp_path: Path) -> None:
    record = Record()
    with following(tmp_path, [record]):
        for epoch in (1, 2, 2, 3):  # the second again, by workers that were started anew
            leave_report(tmp_path, {"epoch": epoch, "train/loss": 1 / epoch})
    assert record.column("epoch") == [1, 2, 3]
    assert not (tmp_path / REPORTS).exists()


def test_what_a_sink_cannot_take_is_an_error_and_is_told_the_next_time(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        leave_report(tmp_path, {"epoch": epoch})
    with pytest.raises(OSError, match="No space left"), following(tmp_path, [FullDisk()]):
        pass
    record = Record()
    with following(tmp_path, [record]):
        pass
    assert record.column("epoch") == [1, 2, 3]


def test_a_sign_of_ones_own_leaves_those_of_others_alone(tmp_path: Path) -> None:
    with stop_sign(tmp_path / "run") as sign:
        sign.parent.mkdir()
        sign.touch()
        with stop_sign(tmp_path / "run", "-me") as mine:
            assert not is_told_to_stop(tmp_path / "run", "-me")
            mine.touch()
            assert is_told_to_stop(tmp_path / "run", "-me")
        assert is_told_to_stop(tmp_path / "run")
    assert not (tmp_path / "run").exists()
