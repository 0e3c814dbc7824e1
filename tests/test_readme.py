"""What the README tells a newcomer to type exists: commands, targets, files and keys."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from meamtm.cli import app
from meamtm.config import RunConfig, known_keys

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.split("#")[0].strip()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.strip() and not language
]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("meamtm ")])
def test_a_command_of_the_readme_parses(line: str) -> None:
    name, *words = shlex.split(line)[1:]
    command = get_command(app).commands[name]
    context = command.make_context(name, list(words))
    for change in context.params.get("changes") or []:
        assert change.partition("=")[0] in known_keys(RunConfig)


def test_its_make_targets_exist() -> None:
    targets = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert targets == ["quickstart", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


SCRIPTS = [path.name for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.name != "contest.py"]  # of others


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_finds_what_it_imports(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("usage: ")


def test_the_files_that_it_names_exist() -> None:
    names = re.findall(r"(?:configs|docs)/[\w./-]+\.(?:yaml|md)", TEXT)
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_keys_of_its_table_exist() -> None:
    table = TEXT[TEXT.index("## Settings") : TEXT.index("## Where everything lives")]
    keys = re.findall(r"`([a-z]+\.[a-z_]+)`", table)
    assert len(keys) > 15
    assert [key for key in keys if key not in known_keys(RunConfig)] == []
