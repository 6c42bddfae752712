"""`vistok train`: a recipe, a data set, a run folder."""

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.terminal import console


def command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (strata/tiny) or a YAML file.")],
    data: Annotated[str, typer.Option("--data", help="Folder, parquet, shards, or a datasets id.")],
    run: Annotated[Path, typer.Option("-o", "--output", help="The run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="train.steps=500")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the run anew.")] = False,
) -> None:
    """Train a model from a recipe. Killed at any moment, the same command with --resume ends in the same weights.

    Leaves RUN/model, which every -m takes; curves in RUN/log.csv and RUN/tensorboard, pictures in RUN/samples.
    """
    from vistok.training.recipe import load_recipe

    checked = load_recipe(recipe, overrides or [])  # before torch is imported: a typo costs no waiting

    from vistok.processes import part, rank
    from vistok.training.trainer import train

    model = train(checked, data, run, resume=resume, overwrite=overwrite, console=console())
    if rank() == 0:
        console().print(f"done: {model}", markup=False)
    part()
