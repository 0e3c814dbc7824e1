"""How many wrong labels are found by listening to the most doubtful clips of a cross-validation?

`change` gives some clips of an ESC-50-style data set another class, drawn at random, as a manifest; `count` looks where
these stand in predictions.csv. From the repository root:

    python benchmarks/mislabelled.py change ../esc10 esc10.csv 20 > changed.csv
    meamtm pack ../esc10 data/esc10-changed --manifest changed.csv
    meamtm crossval configs/esc10-small.yaml data.path=data/esc10-changed
    python benchmarks/mislabelled.py count ../esc10 esc10.csv runs/NAME-crossval-SIGNATURE/predictions.csv
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from meamtm.training.predictions import read_predictions


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("change", "count"))
    parser.add_argument("source", type=Path, help="folder of an ESC-50-style data set")
    parser.add_argument("table", help="its CSV: filename, fold, category")
    parser.add_argument("argument", help="change: how many labels; count: predictions.csv")
    parser.add_argument("--seed", type=int, default=0, help="another seed changes others")
    options = parser.parse_args()
    clips = pd.read_csv(options.source / options.table)
    if options.what == "change":
        changed(clips, int(options.argument), options.seed).to_csv(sys.stdout, index=False)
    else:
        count(clips, Path(options.argument))


def changed(clips: pd.DataFrame, num_changed: int, seed: int) -> pd.DataFrame:
    """Gives the manifest with some labels changed, each to any of the other classes."""
    generator = np.random.default_rng(seed)
    classes = sorted(clips["category"].unique())
    labels = clips["category"].tolist()
    for place in generator.choice(len(labels), num_changed, replace=False):
        labels[place] = generator.choice([name for name in classes if name != labels[place]])
    return pd.DataFrame({"path": "audio/" + clips["filename"], "label": labels, "fold": clips["fold"]})


def count(clips: pd.DataFrame, path: Path) -> None:
    """Prints how many of the wrong labels are among the first clips, and what chance would find."""
    truth = {Path(name).stem: category for name, category in zip(clips["filename"], clips["category"], strict=True)}
    predictions = read_predictions(path)
    is_wrong = np.array([truth[Path(each.clip).name] != each.label for each in predictions])
    is_mistaken = np.array([each.num_right == 0 for each in predictions])
    num_wrong = int(is_wrong.sum())
    for times in (1, 2, 3):
        first = times * num_wrong
        by_chance = first * num_wrong / len(predictions)
        print(f"first {first:3}: {is_wrong[:first].sum():3} of {num_wrong} wrong labels; by chance {by_chance:.1f}")
    print(f"named wrong by all: {is_mistaken.sum()} clips, {(is_wrong & is_mistaken).sum()} wrong labels among them")


if __name__ == "__main__":
    main()
