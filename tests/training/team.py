"""Runs that several gloo processes train together: each goes through the same recipes, into FOLDER/NAME."""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp

from tests.training import patient, pupil  # noqa: F401
from vistok.training import sharding, trainer
from vistok.training.recipe import Recipe, check


def spawn(
    folder: Path,
    photos: Path,
    recipes: dict[str, Recipe],
    processes: int = 2,
    stops: dict[str, int] | None = None,
) -> None:
    """Train every recipe in `folder` with this many gloo processes.

    `stops`: those that are left at a step as a kill leaves them, and resumed. Blocks of any size are sharded.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = {name: recipe.plain() for name, recipe in recipes.items()}
    mp.spawn(_member, args=(str(folder), str(photos), plain, processes, port, stops or {}), nprocs=processes)


class Stopped(BaseException):
    """What a kill looks like from inside."""


def _member(rank: int, folder: str, photos: str, plain: dict, processes: int, port: int, stops: dict) -> None:
    torch.set_num_threads(1)
    sharding.SMALLEST = 1
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({key: str(value) for key, value in here.items()})
    for name, recipe in plain.items():
        run, held = Path(folder) / name, check(recipe, name)
        if name in stops:
            original = trainer.Trainer._after_step

            def stop(self: trainer.Trainer, last: int, name: str = name, original: Any = original) -> None:
                if self.step == stops[name]:
                    raise Stopped
                original(self, last)

            with patch.object(trainer.Trainer, "_after_step", stop), suppress(Stopped):
                trainer.train(held, photos, run)
        trainer.train(held, photos, run, resume=name in stops)
    torch.distributed.destroy_process_group()
