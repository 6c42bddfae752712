"""Where frozen judges get their weights: a file of the user's, or one on the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vistok import tensorfile
from vistok.errors import FormatError, VistokError
from vistok.pickles import read_pickle

Source = str | Path


def read_weights(sources: Source | Sequence[Source], what: str) -> dict[str, Tensor]:
    """The tensors of all `sources` together: paths of safetensors or PyTorch files, or `owner/repo:file` on the Hub.

    Nothing but tensors is ever unpickled. Raises FormatError for damage, VistokError, which names `what` and the ways
    out, for a file that cannot be had.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    found: dict[str, Tensor] = {}
    for source in sources:
        path = _locate(source, what)
        held = tensorfile.read(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
        for key in ("state_dict", "model", "teacher"):
            if isinstance(held, dict) and isinstance(held.get(key), dict):
                held = held[key]
        if not isinstance(held, dict) or not held:
            raise FormatError(f"{path} holds no tensors by name; {what} needs a state dict")
        found |= {key: value for key, value in held.items() if isinstance(value, Tensor)}
    return found


def _locate(source: Source, what: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    repo, _, name = str(source).partition(":")
    if isinstance(source, Path) or repo.count("/") != 1 or not name or repo.startswith((".", "/", "~")):
        raise VistokError(
            f"{what}: no file {source}; give the path of a safetensors or PyTorch file, or owner/repo:file on the Hub"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name))
    except Exception as error:  # the Hub client raises a family of errors that has changed between its versions
        raise VistokError(
            f"{what}: cannot get {name} of {repo} from the Hugging Face Hub ({type(error).__name__}); without a "
            "network give weights=PATH of a file you have (for a perceptual term, 'steerable' needs none)"
        ) from error
