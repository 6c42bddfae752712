"""The frozen text tower of OpenAI's CLIP, as text-conditioned tokenizers and generators read it.

    B strings -> tokens (B, 77), cut at 77, filled up with 0
      -> causal transformer -> final norm -> features (B, 77, width)

The weights come from the Hugging Face Hub through the `transformers` package (extra `models`), when the first text is
encoded. Code that trained on OpenAI's or open_clip's tokenizer saw zeros after the end token, where transformers would
repeat the end token: the features of those positions differ, so the zeros are kept. No mask covers them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InputError, VistokError
from vistok.extras import import_extra

_loaded: dict[tuple[str, str], tuple[Any, Any]] = {}


@torch.no_grad()
def clip_text_features(
    texts: Sequence[str], model: str = "openai/clip-vit-large-patch14-336", device: torch.device | str = "cpu"
) -> Tensor:
    """Features (B, context, width) of each text, float32, after the tower's final norm, padding positions included.

    `model` is a Hub id or a folder. Raises MissingExtraError without transformers, VistokError when the model cannot be
    had, InputError for what is not text.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("expected a list of strings to encode as text")
    tokenizer, tower = _load(model, str(device))
    context = tower.config.max_position_embeddings
    rows = tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]
    ids = torch.zeros(len(rows), context, dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return tower(input_ids=ids.to(device)).last_hidden_state.float()


def _load(model: str, device: str) -> tuple[Any, Any]:
    if (model, device) not in _loaded:
        transformers = import_extra("transformers", "models")
        try:
            tower = transformers.CLIPTextModel.from_pretrained(model).eval().requires_grad_(False).to(device)
            _loaded[model, device] = transformers.CLIPTokenizer.from_pretrained(model), tower
        except OSError as error:
            raise VistokError(
                f"cannot get the text model {model!r} ({str(error).splitlines()[0]}); check the network, or pass the "
                "text's features (B, 77, 768) instead of strings"
            ) from error
    return _loaded[model, device]
