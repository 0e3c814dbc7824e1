"""Who may import whom, and what importing may do: nothing."""

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

LEFT_TO_RIGHT = (
    ("errors", "files"),
    ("config",),
    ("data", "model", "tracking"),
    ("training",),
    ("inference",),
    ("distributed",),
    ("crossval",),
    ("screen",),
    ("tables",),
    ("cli",),
    ("tune",),
    ("jobs",),
)
"""Rooms in reading order, as in docs/design.md: each imports only from those before its own place."""

WITHOUT_RANK = {"meamtm", "meamtm.errors"}
"""What everybody may import: the version and the exceptions."""

HOMES = {
    "ray": ("meamtm/distributed/", "tune/", "jobs/"),
    "mlflow": ("meamtm/tracking/", "meamtm/inference/serve.py", "tune/record.py"),
}
"""Heavy libraries, and the only files that may import them."""

INSIDE_FUNCTIONS = ("mlflow", "sklearn")
"""Libraries that no file may load merely by being imported."""


class Import(NamedTuple):
    """One import statement."""

    file: str
    line: int
    module: str
    is_lazy: bool
    """Within a function, or for type checkers alone."""


def imports(root: Path) -> list[Import]:
    """Every import of every Python file in the rooms below a root."""
    files = [file for folder in ("meamtm", "tune", "jobs") for file in sorted((root / folder).rglob("*.py"))]
    return [found for file in files for found in _imports_of(file, file.relative_to(root).as_posix())]


def _imports_of(path: Path, name: str) -> Iterator[Import]:
    def walk(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            lazy = is_lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_for_types(child)
            if isinstance(child, ast.Import):
                yield from (Import(name, child.lineno, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from (Import(name, child.lineno, module, lazy) for module in _modules(child, path))
            else:
                yield from walk(child, lazy)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def _modules(node: ast.ImportFrom, path: Path) -> list[str]:
    """What `from X import a, b` loads: X, and a and b as well where they are modules of ours."""
    assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
    assert node.module is not None
    inner = [f"{node.module}.{alias.name}" for alias in node.names]
    modules = [module for module in inner if _is_module(module)]
    return modules if len(modules) == len(inner) else [node.module, *modules]


def _is_module(name: str) -> bool:
    place = ROOT / Path(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def room(module: str) -> str | None:
    """The room of a module of ours; None for other people's."""
    first, _, rest = module.partition(".")
    if first == "meamtm":
        return rest.partition(".")[0] or "meamtm"
    return first if first in ("tune", "jobs") else None


def violations(root: Path) -> list[str]:
    """Import statements that the table forbids, with the reason."""
    place = {name: position for position, rooms in enumerate(LEFT_TO_RIGHT) for name in rooms}
    found = []
    for file, line, module, is_lazy in imports(root):
        mine = room(file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
        other = room(module)
        if (
            other is not None
            and other != mine
            and module not in WITHOUT_RANK
            and place[other] >= place.get(mine or "", -1)
        ):
            found.append(f"{file}:{line}: {mine} may not import {module}")
        library = module.partition(".")[0]
        if library in HOMES and not file.startswith(HOMES[library]):
            found.append(f"{file}:{line}: {library} is imported in {', '.join(HOMES[library])} only")
        if library in INSIDE_FUNCTIONS and not is_lazy:
            found.append(f"{file}:{line}: {library} is imported inside functions only")
    return found


def test_rooms_import_only_from_rooms_before_them() -> None:
    assert violations(ROOT) == []


def test_the_table_names_every_room() -> None:
    inside = {path.stem for path in (ROOT / "meamtm").iterdir() if not path.name.startswith("__")}
    assert inside | {"tune", "jobs"} == {name for rooms in LEFT_TO_RIGHT for name in rooms}


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("meamtm/config/wrong.py", "from meamtm.training.train import train", "config may not import meamtm.training"),
        ("meamtm/errors.py", "import meamtm.config", "errors may not import meamtm.config"),
        ("meamtm/data/wrong.py", "from meamtm import model", "data may not import meamtm.model"),
        ("meamtm/model/wrong.py", "from meamtm.tracking import Sink", "model may not import meamtm.tracking"),
        ("meamtm/__init__.py", "from meamtm.config import RunConfig", "meamtm may not import meamtm.config"),
        ("meamtm/cli.py", "def show():\n    import tune.study", "cli may not import tune.study"),
        ("tune/study.py", "from jobs.spec import load_job", "tune may not import jobs.spec"),
        ("meamtm/training/wrong.py", "def f():\n    import ray.train", "ray is imported in meamtm/distributed/"),
        ("meamtm/training/wrong.py", "def f():\n    import mlflow", "mlflow is imported in meamtm/tracking/"),
        ("meamtm/tracking/wrong.py", "import mlflow.entities", "mlflow is imported inside functions only"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str, problem: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(f"import json\n\n{line}\n")
    [found] = violations(tmp_path)
    assert found.startswith(f"{file}:{3 + line.count(chr(10))}: {problem}")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("meamtm/training/right.py", "from meamtm.model.mel import MelLayer"),
        ("meamtm/data/right.py", "from meamtm import __version__"),
        ("meamtm/tracking/right.py", "if TYPE_CHECKING:\n    import mlflow"),
        ("meamtm/tracking/right.py", "def f():\n    import mlflow"),
        ("tune/right.py", "import ray.tune"),
    ],
)
def test_a_right_import_is_none_of_them(tmp_path: Path, file: str, line: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert len(imports(tmp_path)) == 1
    assert violations(tmp_path) == []


def test_no_file_has_the_name_of_a_library_that_it_would_hide() -> None:
    """Beside a file tune.py, `from ray import tune` and `import tune` would mean one thing here and another there."""
    files = [file for folder in ("meamtm", "tune", "jobs") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert {file.name for file in files}.isdisjoint({"tune.py", "jobs.py", "ray.py", "mlflow.py"})
    assert [file.name for file in files if "from ray import tune" in file.read_text()] == []


PROBE = """
import json, pathlib, random, sys, threading
heavy, seeds = {}, []
random.seed = seeds.append
for module in sys.argv[1:]:
    __import__(module)
    heavy[module] = [name for name in ("ray", "mlflow") if name in sys.modules]
torch = sys.modules.get("torch")
print(json.dumps({
    "heavy": heavy,
    "seeds": seeds,
    "cuda": torch and torch.cuda.is_initialized(),
    "files": sorted(path.name for path in pathlib.Path.cwd().iterdir()),
    "threads": threading.active_count(),
}))
"""


def probe(folder: Path, *modules: str, path: Path = ROOT) -> dict[str, Any]:
    """Imports modules one after the other in a process and folder of their own, and tells what that did."""
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", PROBE, *modules]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    *said, report = done.stdout.splitlines()
    return json.loads(report) | {"said": "\n".join(said) + done.stderr}


def all_modules() -> list[str]:
    """Every module of the rooms; the lightest of imports, training's, comes first, where ray is not there yet."""
    files = [file for folder in ("meamtm", "tune", "jobs") for file in (ROOT / folder).rglob("*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    first = ["meamtm.config", "meamtm.cli", "meamtm.training.train", "meamtm.inference.predict", "meamtm.distributed"]
    return [*first, *sorted(names - set(first))]


def test_importing_does_nothing(tmp_path: Path) -> None:
    found = probe(tmp_path / "empty", *all_modules())
    assert found["said"] == ""
    assert found["files"] == []
    assert found["threads"] == 1
    assert found["seeds"] == []
    assert found["cuda"] is False
    for module in ("meamtm.cli", "meamtm.training.train", "meamtm.inference.predict", "meamtm.distributed"):
        assert found["heavy"][module] == [], module
    assert found["heavy"]["tune.study"] != []  # so the probe sees what is loaded


def test_the_probe_sees_what_a_module_does(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("")
    (tmp_path / "loud.py").write_text(
        "import pathlib, random, threading, time, mlflow\n"
        "print('hello'); random.seed(1); pathlib.Path('litter').touch()\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    found = probe(tmp_path / "empty", "loud", path=tmp_path)
    assert (found["said"], found["files"], found["threads"], found["seeds"]) == ("hello", ["litter"], 2, [1])
    assert found["heavy"]["loud"] == ["mlflow"]


def test_help_answers_within_a_second() -> None:
    command = [str(Path(sys.executable).with_name("meamtm")), "--help"]
    seconds: list[float] = []
    text = ""
    while len(seconds) < 3 or (min(seconds) > 1 and len(seconds) < 6):  # a busy machine may need a few more tries
        began = time.perf_counter()
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - began)
    assert min(seconds) <= 1, seconds
    for name in ("synth", "pack", "show", "train", "evaluate", "predict", "embed"):
        assert f"  {name} " in text
