"""Contenders that do the same work -> a table: medians over fresh processes that take turns, and peak memory.

A script names its contenders and cases, and hands both to `contest`:

    contest(__file__, {"ours": ours, "theirs": theirs}, {"short": {"clip_s": 1}}, reference="ours")

A contender is a function from a case to its work. It imports and builds what it needs, which is not measured, and
returns a function that is: called again and again, it may return a dict of figures of its own. ImportError and
AbsentError leave a contender out, with the reason. Memory is what a process takes above what it held when it had built
and given back what it no longer needed. A case may ask for fewer runs: `num_warmup` (1) and `num_timed` (3, or more).
Where others use the machine, CPU time says more than the clock.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Work = Callable[[], Mapping[str, float] | None]
Contender = Callable[[dict[str, Any]], Work]


class AbsentError(Exception):
    """Says why a contender cannot take part."""


def contest(
    script: str,
    contenders: Mapping[str, Contender],
    cases: Mapping[str, dict[str, Any]],
    *,
    reference: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    columns: Sequence[str] = (),
) -> None:
    """Runs a script's command line: prints a table and writes JSON beside the script.

    Options of `add_arguments` become part of every case; `columns` are the figures of their own that contenders return.
    """
    description = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per figure")
    parser.add_argument("--measure-s", type=float, default=2.0, help="how long each measures, s")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--only", nargs="*", choices=list(contenders), help="contenders, instead of all")
    parser.add_argument("--measure", nargs=2, metavar=("CONTENDER", "CASE"), help=argparse.SUPPRESS)
    add_arguments(parser)
    options = parser.parse_args()
    if options.measure:
        name, case = options.measure
        print(json.dumps(measure(contenders[name], json.loads(case), options.measure_s)))
        return
    shared = {key: value for key, value in vars(options).items() if key not in ("measure", "only", "processes")}
    chosen = [name for name in contenders if not options.only or name in options.only]
    rows = []
    for label, case in cases.items():
        runs = take_turns(script, chosen, shared | case, options.processes)
        rows += [{"case": label, "contender": name, **summary(runs[name])} for name in chosen]
        show(label, rows, reference, columns)
        result = {"options": shared | {"processes": options.processes}, "rows": rows}
        Path(script).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def take_turns(
    script: str, names: Sequence[str], case: dict[str, Any], num_processes: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs every contender once, then every one again, so that all see the same machine."""
    from rich.progress import Progress

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with Progress(transient=True) as bar:
        task = bar.add_task("", total=num_processes * len(names))
        for _ in range(num_processes):
            for name in names:
                bar.update(task, description=name)
                if not any("absent" in run for run in runs[name]):
                    runs[name].append(run(script, name, case))
                bar.advance(task)
    return runs


def run(script: str, name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Measures one contender in a process of its own."""
    threads = str(case["threads"])
    environment = os.environ | {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    command = [sys.executable, script, "--measure", name, json.dumps(case), "--measure-s", str(case["measure_s"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(contender: Contender, case: dict[str, Any], measure_s: float) -> dict[str, Any]:
    """Builds, runs once to warm up, then again and again; gives medians and the peak above what building left."""
    try:
        work = contender(case)
    except (ImportError, AbsentError) as reason:
        return {"absent": str(reason)}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, and is not taken for idle memory
    Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the work's own peak
    idle_mb = memory_mb("VmHWM")
    cuda = cuda_in_use()
    idle_cuda_mb = cuda.memory_allocated() / 2**20 if cuda else 0.0
    if cuda:
        cuda.reset_peak_memory_stats()
    for _ in range(case.get("num_warmup", 1)):
        work()
    times, cpu_times, figures, began = [], [], [], time.perf_counter()
    while len(times) < case.get("num_timed", 3) or time.perf_counter() - began < measure_s:
        started, cpu_started = time.perf_counter(), time.process_time()
        figures.append(work() or {})
        if cuda:
            cuda.synchronize()
        times.append(time.perf_counter() - started)
        cpu_times.append(time.process_time() - cpu_started)
    own = {key: statistics.median(figure[key] for figure in figures) for key in figures[0]}
    peak_mb = cuda.max_memory_allocated() / 2**20 - idle_cuda_mb if cuda else memory_mb("VmHWM") - idle_mb
    reserved = {"reserved_mb": cuda.max_memory_reserved() / 2**20} if cuda else {}
    ms, cpu_ms = (1_000 * statistics.median(each) for each in (times, cpu_times))
    return {"ms": ms, "cpu_ms": cpu_ms, "peak_mb": peak_mb, "device": "cuda" if cuda else "cpu", **reserved, **own}


def cuda_in_use() -> Any:
    """Gives torch.cuda if the contender has put something there."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def memory_mb(key: str) -> float:
    """What Linux says of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gives each figure's median over processes, and how far the times spread."""
    if "absent" in runs[0]:
        return runs[0]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "device"}
    times = [run["ms"] for run in runs]
    return {**medians, "device": runs[0]["device"], "least_ms": min(times), "most_ms": max(times)}


def show(case: str, rows: Sequence[dict[str, Any]], reference: str, columns: Sequence[str]) -> None:
    """Prints a case's rows; the ratio is a contender's time over the reference's."""
    from rich.console import Console
    from rich.table import Table

    rows = [row for row in rows if row["case"] == case]
    unit = next((row["ms"] for row in rows if row["contender"] == reference and "ms" in row), None)
    table = Table(title=case)
    table.add_column("contender")
    for column in ("ms", "least to most", f"over {reference}", "CPU ms", "peak MB", *columns):
        table.add_column(column, justify="right")
    for row in rows:
        if "absent" in row:
            table.add_row(row["contender"], "-", row["absent"])
            continue
        ratio = f"{row['ms'] / unit:.2f}" if unit else "-"
        spread = f"{row['least_ms']:.1f} to {row['most_ms']:.1f}"
        own = (f"{row[column]:.4g}" if column in row else "-" for column in columns)
        table.add_row(
            row["contender"],
            f"{row['ms']:.1f}",
            spread,
            ratio,
            *(f"{row[key]:.1f}" for key in ("cpu_ms", "peak_mb")),
            *own,
        )
    console = Console()
    console.width = max(console.width, 140)  # a file has room
    console.print(table)
