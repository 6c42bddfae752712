"""Checkpoints of a run: whole or absent, verified when read, the last two kept.

    RUN/checkpoints/step-00001000/
        model.safetensors   weights and buffers as trained
        ema.safetensors     their moving average, where there is one
        state.pt            optimizer, loss scaler, sums of the terms since the last logged row (weights_only)
        checkpoint.json     step, stage, and the size and SHA-256 of the files above; written last

Random numbers need no state: those of step k are drawn from (seed, k) alone (`step_seed`), as the batches are.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.errors import FormatError, OutputError

VERSION = 1
KEEP = 2
logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """A run after `step` completed steps, inside stage number `stage`."""

    step: int
    stage: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of everything random at one step of one process: a hash, so that neighbours are unrelated."""
    digest = hashlib.blake2b(f"vistok {seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `folder` and remove all but the last two. Raises OutputError, with nothing changed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_apart(checkpoint.model), temporary / "model.safetensors")
        if checkpoint.ema is not None:
            save_file(_apart(checkpoint.ema), temporary / "ema.safetensors")
        with open(temporary / "state.pt", "wb") as file:
            torch.save(checkpoint.state, file)
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        facts = {"version": VERSION, "step": checkpoint.step, "stage": checkpoint.stage, "files": files}
        (temporary / "checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        told = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
        raise OutputError(f"cannot write the checkpoint {final}: {told}; the one before it is kept") from error
    for old in steps_in(folder)[:-KEEP]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return final


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit())


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, None if there is none. Damaged ones are passed over with a warning."""
    for step in reversed(steps_in(folder)):
        try:
            return load(folder / f"step-{step:08d}")
        except FormatError as error:
            logger.warning("%s; the checkpoint before it is used", error)
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises FormatError when anything in it is missing, cut short or changed."""
    from safetensors.torch import load_file

    try:
        facts = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        if facts["version"] > VERSION:
            raise FormatError(f"{path} was written by a newer vistok; upgrade vistok")
        for name, expected in facts["files"].items():
            if _describe(path / name) != expected:
                raise FormatError(f"{path / name} is damaged: its size or checksum is not the recorded one")
        return Checkpoint(
            step=facts["step"],
            stage=facts["stage"],
            model=load_file(path / "model.safetensors"),
            ema=load_file(path / "ema.safetensors") if "ema.safetensors" in facts["files"] else None,
            state=torch.load(path / "state.pt", map_location="cpu", weights_only=True),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not a whole checkpoint ({error})") from error


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with memory of its own, as safetensors wants them (tied weights share theirs)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        found[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return found
