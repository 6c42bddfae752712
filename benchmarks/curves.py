"""Record the reference loss curve of a recipe: train it with several seeds, write its band beside it.

    python benchmarks/curves.py strata/tiny --data ../shared/data/imagenet-samples/train -o RUNS [--seeds 3]

Killed at any moment, the same command goes on. Writes vistok/recipes/<slug>/<name>.curve.json, which `vistok train`
compares runs of that recipe with.
"""

import argparse
from pathlib import Path

from vistok.cli.terminal import console
from vistok.training.recipe import find, load_recipe
from vistok.training.reference import record
from vistok.training.trainer import train


def main() -> None:
    """Train, then record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    runs = []
    for seed in range(given.seeds):
        run = given.output / f"seed-{seed}"
        quiet = ["train.tensorboard=false", "train.sample_every=0", "train.validate_every=0"]
        recipe = load_recipe(given.recipe, [f"train.seed={seed}", *quiet])
        train(recipe, given.data, run, resume=True, console=console())
        runs.append(run)
    path = find(given.recipe).with_suffix(".curve.json")
    record(given.recipe, runs, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
