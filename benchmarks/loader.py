"""How fast clips reach a training step, and what memory that takes.

Five-second clips at 16 kHz, batches of 32, warm page cache. Every figure is a median over fresh processes; `own MB` is
memory that only this process has (RssAnon), `resident MB` counts the mapped files too. Run it from the repository root:

    python benchmarks/loader.py [--clips 400] [--times 20] [--processes 5]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

from meamtm.config import DataConfig
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.loader import Loader
from meamtm.data.pack import pack

RATE_HZ = 16_000
CLIP_SAMPLES = 5 * RATE_HZ
BATCH_SIZE = 32
MEASURED_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=400, help="clips of the 1x data set")
    parser.add_argument("--times", type=int, default=20, help="how many times larger the second data set is")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per figure")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, folder = arguments.measure
        print(json.dumps(measure(way, Path(folder))))
    else:
        compare(arguments.clips, arguments.times, arguments.processes)


def compare(num_clips: int, times: int, num_processes: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in (1, times):
            folder = Path(scratch) / f"{size}x"
            write_set(folder, size * num_clips)
            for way in WAYS:
                runs = [run(way, folder) for _ in range(num_processes)]
                row = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
                rows.append({"way": way, "data": f"{size}x", "clips": size * num_clips, **row})
    print(f"{'':24}{'data':>6}{'clips/s':>10}{'own MB':>9}{'resident MB':>13}{'open ms':>9}")
    for row in rows:
        print(
            f"{row['way']:24}{row['data']:>6}{row['clips_per_s']:>10,.0f}{row['own_mb']:>9.1f}"
            f"{row['resident_mb']:>13.1f}{row['open_ms']:>9.1f}"
        )
    ours = [row for row in rows if row["way"] == "meamtm"]
    added = (ours[1]["own_mb"] - ours[0]["own_mb"]) * 2**20 / (ours[1]["clips"] - ours[0]["clips"])
    print(f"own memory per added clip: {added:.0f} bytes")
    result = {"rows": rows, "own_bytes_per_added_clip": added}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


def write_set(folder: Path, num_clips: int) -> None:
    """Packs noisy sweeps and decodes them into the node cache."""
    time_s = np.arange(CLIP_SAMPLES) / RATE_HZ
    for number in range(num_clips):
        path = folder / "in" / "ab"[number % 2] / f"{number:06d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep = np.sin(2 * np.pi * (200 + number % 997) * time_s * (1 + 0.1 * time_s))
        soundfile.write(path, 0.3 * sweep, RATE_HZ)
    pack(folder / "in", folder / "packed")
    open_set(folder)


def open_set(folder: Path) -> Clips:
    data = DataConfig(path=str(folder / "packed"), cache_dir=str(folder / "cache"))
    return open_clips(data, RATE_HZ)


def run(way: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", way, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(way: str, folder: Path) -> dict[str, float]:
    """Opens the set, hears it once to warm up, then counts clips."""
    started_s = time.perf_counter()
    clips = open_set(folder)
    open_ms = 1_000 * (time.perf_counter() - started_s)
    epoch_lengths = WAYS[way](clips)
    sum(epoch_lengths(0))
    num_clips, epoch, started_s = 0, 1, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started_s) < MEASURED_S:
        num_clips += sum(epoch_lengths(epoch))
        epoch += 1
    return {"clips_per_s": num_clips / elapsed_s, "open_ms": open_ms, **memory_mb()}


def with_loader(clips: Clips) -> Callable[[int], Iterator[int]]:
    loader = Loader(clips, np.arange(len(clips)), CLIP_SAMPLES, BATCH_SIZE, seed=0, train=True)
    return lambda epoch: (len(batch.waveform) for batch in loader.epoch(epoch))


def with_stack(clips: Clips) -> Callable[[int], Iterator[int]]:
    """What one writes first: stack the mapped views of a batch."""

    def lengths(epoch: int) -> Iterator[int]:
        order = np.random.default_rng(epoch).permutation(len(clips)).tolist()
        for low in range(0, len(order), BATCH_SIZE):
            yield len(np.stack([clips.waveform(clip) for clip in order[low : low + BATCH_SIZE]]))

    return lengths


def with_torch(clips: Clips) -> Callable[[int], Iterator[int]]:
    """The usual way: a map-style data set over the same mapped file, in this process."""
    import torch.utils.data

    class Sounds(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(clips)

        def __getitem__(self, clip: int) -> torch.Tensor:
            return torch.from_numpy(clips.waveform(clip).copy())

    batches = torch.utils.data.DataLoader(Sounds(), BATCH_SIZE, shuffle=True)
    return lambda _: (len(batch) for batch in batches)


WAYS = {"meamtm": with_loader, "np.stack of mapped clips": with_stack, "torch DataLoader": with_torch}


def memory_mb() -> dict[str, float]:
    """What Linux says of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1024 for name, key in [("own_mb", "RssAnon"), ("resident_mb", "VmRSS")]}


if __name__ == "__main__":
    main()
