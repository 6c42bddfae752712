"""Runs that several gloo processes train together: each goes through the same recipes, into FOLDER/NAME."""

import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp

from tests.training import patient, pupil  # noqa: F401
from vistok.training.recipe import Recipe, check
from vistok.training.trainer import train


def spawn(folder: Path, photos: Path, recipes: dict[str, Recipe], processes: int = 2) -> None:
    """Train every recipe in `folder` with this many gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = {name: recipe.plain() for name, recipe in recipes.items()}
    mp.spawn(_member, args=(str(folder), str(photos), plain, processes, port), nprocs=processes)


def _member(rank: int, folder: str, photos: str, plain: dict, processes: int, port: int) -> None:
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in here.items()})
    for name, recipe in plain.items():
        train(check(recipe, name), photos, Path(folder) / name)
    torch.distributed.destroy_process_group()
