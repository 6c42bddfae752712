"""The folder of a run: what lies in it, who may continue it.

RUN/recipe.yaml     the recipe with all overrides     RUN/run.json        the data it was started on
RUN/log.csv         one row per logged step           RUN/validation.csv  PSNR on held-out pictures
RUN/vitals.csv      what the doctor reads: ranges, gradients per part, codebook usage
RUN/codebooks.csv   how much of each codebook every epoch used
RUN/samples/*.png   originals and reconstructions     RUN/tensorboard/    the same curves and pictures
RUN/checkpoints/    the last two                      RUN/model/          a model folder: vistok.load("RUN/model")
RUN/stages/NAME/    the model of a finished stage     RUN/best/           the model that validated best, where asked for
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from vistok.errors import ConfigError, FormatError, MismatchError, OutputError
from vistok.files import write_atomically
from vistok.training import checkpoint
from vistok.training.recipe import Recipe, check, differences

CONTENTS = (
    "checkpoints",
    "model",
    "best",
    "stages",
    "samples",
    "tensorboard",
    "log.csv",
    "vitals.csv",
    "validation.csv",
    "codebooks.csv",
    "run.json",
    "recipe.yaml",
)


class RunFolder:
    """A run's folder, opened for a recipe and its data.

    A folder that exists is refused unless `resume` (the same recipe and data) or `overwrite` (a run, replaced).
    Raises OutputError, MismatchError (with the differences), FormatError.
    """

    def __init__(
        self, path: Path, recipe: Recipe, data: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = path
        self.checkpoints, self.model = path / "checkpoints", path / "model"
        begun = (path / "recipe.yaml").exists()
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; a run is a folder")
        if path.exists() and not begun and any(path.iterdir()):
            raise OutputError(f"{path} is not empty and not a run (it has no recipe.yaml); choose another folder")
        if begun and resume:
            self._compare(recipe, data)
        elif begun and not overwrite:
            raise OutputError(f"{path} is a run already; --resume continues it, --overwrite begins it anew")
        elif begun:
            for name in CONTENTS:  # what is ours alone: a mistyped path must not cost a home folder
                shutil.rmtree(path / name, ignore_errors=True)
                (path / name).unlink(missing_ok=True)
        if not (begun and resume):
            text = yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True)
            write_atomically(path / "run.json", (json.dumps(data, indent=2) + "\n").encode())
            write_atomically(path / "recipe.yaml", text.encode())

    def latest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint; None for a run that was stopped before its first.

        Raises FormatError where there are checkpoints and none can be read.
        """
        found = checkpoint.load_latest(self.checkpoints)
        if found is None and checkpoint.steps_in(self.checkpoints):
            raise FormatError(f"no checkpoint in {self.checkpoints} can be read; --overwrite begins the run anew")
        return found

    def save_model(self, model: Any, name: str = "model") -> None:
        """Replace the model folder RUN/name by `model`: written beside it first, then exchanged."""
        path = self.path / name
        fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        try:
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            model.save(fresh)
            if path.exists():
                os.replace(path, old)
            os.replace(fresh, path)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        shutil.rmtree(old, ignore_errors=True)

    def save_best(self, model: Any, step: int, name: str, value: float) -> None:
        """Replace RUN/best by `model`, and note the step and what it scored."""
        self.save_model(model, "best")
        facts = {"step": step, name: value}
        write_atomically(self.path / "best" / "best.json", (json.dumps(facts) + "\n").encode())

    def best(self, name: str) -> tuple[int, float] | None:
        """Step and score of RUN/best, None where there is none yet."""
        try:
            facts = json.loads((self.path / "best" / "best.json").read_text(encoding="utf-8"))
            return int(facts["step"]), float(facts[name])
        except (OSError, ValueError, KeyError):
            return None

    def _compare(self, recipe: Recipe, data: dict[str, Any]) -> None:
        try:
            there = yaml.safe_load((self.path / "recipe.yaml").read_text(encoding="utf-8"))
            known = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise FormatError(f"{self.path} is not a whole run: {error}") from error
        with suppress(ConfigError):  # one of another version is left as it is: the differences tell
            there = check(there, str(self.path / "recipe.yaml")).plain()
        changed = differences(there, recipe.plain())
        if changed:
            raise MismatchError(f"{self.path} was begun with another recipe: {'; '.join(changed)}")
        if known.get("fingerprint") != data["fingerprint"]:
            raise MismatchError(
                f"{self.path} was begun on other data: {known.get('items')} pictures ({known.get('path')}), "
                f"here {data['items']} ({data['path']}), or their sizes or names have changed"
            )
