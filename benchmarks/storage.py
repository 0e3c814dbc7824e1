"""What keeping waveforms costs on disk and in time, against keeping spectrograms, or both.

`prepare`: from a packed data set (encoded sounds in Parquet) to what training reads; MB are what that adds on disk.
`read`: one batch of 32 clips in random order, from files in the page cache to log-mel in memory. Precomputed
spectrograms are read and no more, so this is where computing them anew for every batch costs something; but they are of
one front end, and of clips that were never shifted, sped up or mixed as waveforms. From the repository root:

    python benchmarks/storage.py [--data data/esc10] [--threads 1] [--processes 3]
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contender, Work, contest

RATE_HZ, BATCH_SIZE = 16_000, 32
FEW = {"num_warmup": 0, "num_timed": 1}
FRONT_ENDS: dict[str, dict[str, Any]] = {
    "64 bands every 25 ms": {"num_bands": 64, "hop_ms": 25.0},
    "AST, 128 bands every 10 ms": {"kind": "kaldi", "num_bands": 128, "window_ms": 25.0, "hop_ms": 10.0},
}


def waveforms(case: dict[str, Any]) -> Work:
    """Ours: 16-bit samples in the node's cache, the spectrogram anew for every batch."""
    import torch

    from meamtm.data.loader import Loader
    from meamtm.training.prepare import to_float

    folder = Path(case["scratch"]) / "waveforms"
    if case["task"] == "prepare":
        return lambda: prepared(folder, lambda: open_set(case, folder))
    clips, mel, cpu = open_set(case, folder), mel_layer(case), torch.device("cpu")
    loader = Loader(clips, np.arange(len(clips)), case["clip_samples"], BATCH_SIZE, seed=0, train=True)
    batches = (batch for epoch in range(10**9) for batch in loader.epoch(epoch))

    def read() -> None:
        with torch.no_grad():
            mel.log_mel(to_float(next(batches).waveform, cpu))

    return read


def spectrograms(dtype: str, *, and_waveforms: bool = False) -> Contender:
    """Log-mel of every clip in one file."""

    def contender(case: dict[str, Any]) -> Work:
        import torch

        folder = Path(case["scratch"]) / f"{dtype}{and_waveforms}"

        def write() -> None:
            folder.mkdir(parents=True)
            clips, mel = open_set(case, folder / "cache" if and_waveforms else None), mel_layer(case)
            shape = (len(clips), case["num_bands"], mel.num_frames(case["clip_samples"]))
            stored = np.lib.format.open_memmap(folder / "mel.npy", "w+", dtype, shape)
            for clip in range(len(clips)):
                samples = np.zeros(case["clip_samples"], np.float32)
                heard = clips.waveform(clip)[: len(samples)]
                samples[: len(heard)] = heard / np.float32(2**15)
                with torch.no_grad():
                    stored[clip] = mel.log_mel(torch.from_numpy(samples)[None])[0]
            stored.flush()

        if case["task"] == "prepare":
            return lambda: prepared(folder, write)
        prepared(folder, write)
        stored, rng = np.load(folder / "mel.npy", mmap_mode="r"), np.random.default_rng(0)

        def read() -> None:
            torch.from_numpy(stored[rng.permutation(len(stored))[:BATCH_SIZE]]).float()

        return read

    return contender


def open_set(case: dict[str, Any], cache: Path | None) -> Any:
    """Opens the packed set, decoded into a cache, or decoding as one reads."""
    from meamtm.config import DataConfig
    from meamtm.data.cache import open_clips

    where = {"cache": "none"} if cache is None else {"cache_dir": str(cache)}
    return open_clips(DataConfig.model_validate({"path": case["data"], **where}), RATE_HZ)


def mel_layer(case: dict[str, Any]) -> Any:
    from meamtm.config import MelConfig
    from meamtm.model.mel import MelLayer

    return MelLayer(MelConfig.model_validate({key: case[key] for key in MelConfig.model_fields if key in case}))


def prepared(folder: Path, write: Any) -> dict[str, float]:
    """Writes into an empty folder and weighs it."""
    shutil.rmtree(folder, ignore_errors=True)
    write()
    return {"MB": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6}


CONTENDERS = {
    "waveforms (meamtm)": waveforms,
    "float32 spectrograms": spectrograms("float32"),
    "float16 spectrograms": spectrograms("float16"),
    "waveforms and float16": spectrograms("float16", and_waveforms=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(processes=3)
    parser.add_argument("--data", default="data/esc10", help="packed data set")
    parser.add_argument("--clip-samples", type=int, default=5 * RATE_HZ, help="of each clip")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        cases = {
            f"{task}: {name}": {"task": task, "scratch": scratch, **(FEW if task == "prepare" else {}), **front_end}
            for name, front_end in FRONT_ENDS.items()
            for task in ("prepare", "read")
        }
        contest(
            __file__,
            CONTENDERS,
            cases,
            reference="waveforms (meamtm)",
            add_arguments=add_arguments,
            columns=("MB",),
        )
