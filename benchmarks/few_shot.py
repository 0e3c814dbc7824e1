"""A CSV of labelled clips with folds -> a manifest of few of them, about N of each class in all folds but one.

The folds keep their clips apart, so a cross-validation of five folds trains on N clips of each class or one more or
less. From the repository root, for `meamtm pack SOURCE OUT --manifest MANIFEST`:

    python benchmarks/few_shot.py ../esc10 esc10.csv 10 > few.csv
"""

import argparse
import sys
from pathlib import Path

import pandas as pd


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of an ESC-50-style data set")
    parser.add_argument("table", help="its CSV: filename, fold, category")
    parser.add_argument("shots", type=int, help="training clips of each class")
    parser.add_argument("--seed", type=int, default=0, help="another seed takes other clips")
    options = parser.parse_args()
    clips = pd.read_csv(options.source / options.table).sample(frac=1, random_state=options.seed)
    folds = sorted(clips["fold"].unique())
    chosen = []
    for number, (_, of_class) in enumerate(clips.groupby("category")):
        total = options.shots * len(folds) // (len(folds) - 1)
        for place, fold in enumerate(folds):
            share = total // len(folds) + ((place + number) % len(folds) < total % len(folds))  # the rest goes round
            chosen.append(of_class[of_class["fold"] == fold].head(share))
    few = pd.concat(chosen).sort_values("filename")
    few = pd.DataFrame({"path": "audio/" + few["filename"], "label": few["category"], "fold": few["fold"]})
    few.to_csv(sys.stdout, index=False)


if __name__ == "__main__":
    main()
