"""Which code a run is made of."""

import os
import subprocess
from pathlib import Path

JOB_COMMIT = "MEAMTM_JOB_COMMIT"
"""The variable that tells it to a job, which runs in a copy of the code without its history."""


def commit_of_this_code() -> str:
    """Names the commit of the code in use, or of what a job is a copy of."""
    return os.environ.get(JOB_COMMIT) or commit_of(Path(__file__).parent)


def commit_of(folder: Path) -> str:
    """Names a checkout's commit, with -dirty where files differ from it; unknown where there is none, or no git."""
    words = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
