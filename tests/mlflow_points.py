"""What a run measured, read back from MLflow and from its own lines, so that the two can be compared."""

from pathlib import Path

from meamtm.tracking import read_rows
from meamtm.tracking.server import connect

Points = set[tuple[str, int, float]]


def points_of(uri: str, run_id: str) -> Points:
    """All points of a run; fails if one is there twice."""
    client = connect(uri)
    points = [
        (key, point.step, point.value)
        for key in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, key)
    ]
    assert len(points) == len(set(points))
    return set(points)


def points_in(path: Path) -> Points:
    rows = read_rows(path)
    return {(key, int(row["step"]), value) for row in rows for key, value in row.items() if key not in ("step", "time")}
