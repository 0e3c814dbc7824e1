"""Which code a run is made of."""

import os
import subprocess
from pathlib import Path

JOB_COMMIT = "MEAMTM_JOB_COMMIT"
"""The variable that tells it to a job, which runs in a copy of the code without its history."""

OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
"""What git tells those that it calls, of the checkout that it is at work on."""


def commit_of_this_code() -> str:
    """Names the commit of the code in use, or of what a job is a copy of; unknown where it is no checkout's, though an
    environment of it may lie in one."""
    if copied := os.environ.get(JOB_COMMIT):
        return copied
    here = Path(__file__)
    return commit_of(here.parent) if _git(here.parent, "ls-files", here.name) else "unknown"


def commit_of(folder: Path) -> str:
    """Names a checkout's commit, with -dirty where files differ from it; unknown where there is none, or no git."""
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def _git(folder: Path, *words: str) -> str:
    """What git says of a folder; nothing where there is no git, or no checkout."""
    env = {key: value for key, value in os.environ.items() if key not in OF_A_HOOK}
    try:
        found = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False, env=env)
    except OSError:
        return ""
    return found.stdout.strip()
