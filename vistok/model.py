"""The base of every model here: a config, a fingerprint, and the Hugging Face Hub's own verbs.

A folder with `model.safetensors` and `config.json` is a model: `save_pretrained`, `from_pretrained` and `push_to_hub`
are the Hub mixin's, `vistok.load(folder)` reads the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vistok.folder import hash_state, write_folder


class Model(nn.Module, ModelHubMixin, library_name="vistok", repo_url="", tags=["visual-tokenizer"]):
    """A PyTorch module with a typed config. Subclasses set `system` (their slug) and take one config argument."""

    system: ClassVar[str] = ""
    role: ClassVar[str] = "model"
    preprocessing: ClassVar[str] = "rgb, [0, 1]"
    undecayed: ClassVar[tuple[str, ...]] = ()  # parameters that weight decay leaves alone, by shell pattern
    config: Any

    def __init__(self, config: Any, name: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.name = name or self.system
        self._known_hash: tuple[int, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self._first_tensor().device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating parameter."""
        return self._first_tensor().dtype

    def _first_tensor(self) -> Tensor:
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))

    @property
    def fingerprint(self) -> str:
        """Hash of all weights and buffers (32 hex digits), by which tokens and stores know their model.

        A loaded model keeps the hash of the file it came from, in whatever dtype and on whatever device it runs, until
        its weights change.
        """
        version = self._weights_version()
        if self._known_hash is None or self._known_hash[0] != version:
            self._known_hash = (version, hash_state(self.state_dict()))
        return self._known_hash[1]

    def remember_fingerprint(self, fingerprint: str) -> None:
        """Take `fingerprint` as the hash of the weights as they are now (used by the loaders)."""
        self._known_hash = (self._weights_version(), fingerprint)

    def _weights_version(self) -> int:
        return sum(tensor._version for tensor in self.state_dict(keep_vars=True).values())

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` into `folder`, each at once or not at all."""
        write_folder(Path(folder), self.state_dict(), self, self.config, self.name)

    # -- the Hub mixin's hooks -----------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's would decode our config.json by its own rules
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """The Hub mixin's verb: a model folder, or a Hub repository that holds one, in eval mode.

        Of the mixin's further `options`, such as `token` or `cache_dir`, the Hub client's own settings serve here.
        Raises TypeError when it holds another class of model.
        """
        import vistok

        name = str(pretrained_model_name_or_path)
        model = vistok.load(name, revision=revision, local_files_only=local_files_only)
        if not isinstance(model, cls):
            raise TypeError(f"{pretrained_model_name_or_path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model


class without_initial_values(TorchFunctionMode):
    """Build modules without the work of drawing weights that are about to be replaced: their memory stays untouched.

    Inside, in-place operations on parameters do nothing. Buffers get their values as usual.
    """

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by name
        if isinstance(target, nn.Parameter) and _changes_in_place(function):
            return target
        return function(*args, **kwargs)


def _changes_in_place(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


class Aside:
    """Holds what a model uses without owning it (a teacher, a tokenizer, judges): outside its modules and weights, and
    shared by its copies.
    """

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> "Aside":
        return self
