"""The frozen text tower of OpenAI's CLIP, as text-conditioned tokenizers and generators read it.

    B strings -> tokens (B, 77), cut at 77, filled up with 0
      -> causal transformer -> final norm -> features (B, 77, width)

The weights come from the Hugging Face Hub through the `transformers` package (extra `models`), when the first text is
encoded. Code that trained on OpenAI's or open_clip's tokenizer saw zeros after the end token, where transformers would
repeat the end token: the features of those positions differ, so the zeros are kept. No mask covers them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InputError, VistokError
from vistok.extras import import_extra

CLIP_TEXT = "openai/clip-vit-large-patch14-336"

_loaded: dict[tuple[str, str, str], tuple[Any, Any]] = {}


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """Texts as a generator reads them: a state for every position (B, L, D), and one pooled vector each (B, D)."""

    states: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.states.ndim != 3 or self.pooled.shape != (self.states.shape[0], self.states.shape[2]):
            raise InputError(
                f"text features: states {tuple(self.states.shape)} and pooled {tuple(self.pooled.shape)}; expected "
                "(B, L, D) and (B, D)"
            )

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "TextFeatures":
        """On another device, in another type."""
        return TextFeatures(self.states.to(device, dtype), self.pooled.to(device, dtype))

    def expand(self, items: int) -> "TextFeatures":
        """A single text for so many items. Raises InputError for another number of texts."""
        if len(self) not in (1, items):
            raise InputError(f"{len(self)} texts for {items} items")
        return TextFeatures(self.states.expand(items, -1, -1), self.pooled.expand(items, -1))


@torch.no_grad()
def clip_text_features(texts: Sequence[str], model: str = CLIP_TEXT, device: torch.device | str = "cpu") -> Tensor:
    """Features (B, context, width) of each text, float32, after the tower's final norm, padding positions included.

    `model` is a Hub id or a folder. Raises MissingExtraError without transformers, VistokError when the model cannot be
    had, InputError for what is not text.
    """
    return _encode(texts, model, device, "CLIPTextModel").last_hidden_state.float()


@torch.no_grad()
def clip_text_condition(
    texts: Sequence[str], model: str = CLIP_TEXT, device: torch.device | str = "cpu"
) -> TextFeatures:
    """What MaskGen (arXiv:2501.07730) reads of each text: the states before the tower's last block (B, context, width),
    and the projected output at the end token (B, width), float32. Raises as `clip_text_features`.
    """
    told = _encode(texts, model, device, "CLIPTextModelWithProjection", output_hidden_states=True)
    return TextFeatures(told.hidden_states[-2].float(), told.text_embeds.float())


def _encode(texts: Sequence[str], model: str, device: torch.device | str, kind: str, **options: Any) -> Any:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("expected a list of strings to encode as text")
    tokenizer, tower = _load(model, str(device), kind)
    context = tower.config.max_position_embeddings
    rows = tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]
    ids = torch.zeros(len(rows), context, dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return tower(input_ids=ids.to(device), **options)


def _load(model: str, device: str, kind: str) -> tuple[Any, Any]:
    if (model, device, kind) not in _loaded:
        transformers = import_extra("transformers", "models")
        try:
            tower = getattr(transformers, kind).from_pretrained(model).eval().requires_grad_(False).to(device)
            _loaded[model, device, kind] = transformers.CLIPTokenizer.from_pretrained(model), tower
        except OSError as error:
            raise VistokError(
                f"cannot get the text model {model!r} ({str(error).splitlines()[0]}); check the network, or pass the "
                "text's features instead of strings"
            ) from error
    return _loaded[model, device, kind]
