"""Text as T5 reads it, for generators that take its features as their condition.

    B strings -> T5's encoder -> features (B, T, width), mask (B, T): real ones at the end, zeros before them

LlamaGen (arXiv:2406.06525) puts the text to the left of the picture, so that its last words stand next to the first
code. The weights come from the Hugging Face Hub, or a folder, through the `transformers` package (extra `models`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InputError, VistokError
from vistok.extras import import_extra


@dataclass(frozen=True, eq=False)
class T5Features:
    """A batch of texts: `features` float (B, T, width) and `mask` bool (B, T), which of the T positions are there.

    Without a mask, all are. Raises InputError where shapes do not fit.
    """

    features: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or not self.features.is_floating_point():
            raise InputError(f"text features are float (B, T, width), got {tuple(self.features.shape)}")
        if self.mask is not None and self.mask.shape != self.features.shape[:2]:
            raise InputError(f"a mask of {tuple(self.mask.shape)} for features {tuple(self.features.shape)}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def present(self) -> Tensor:
        """The mask, bool (B, T)."""
        if self.mask is None:
            return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)
        return self.mask.bool()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "T5Features":
        """On another device, features in another dtype."""
        return T5Features(self.features.to(device, dtype), self.present.to(device))

    def expand(self, items: int) -> "T5Features":
        """A single text for so many items. Raises InputError for another number of texts."""
        if len(self) not in (1, items):
            raise InputError(f"{len(self)} texts for {items} items")
        return T5Features(self.features.expand(items, -1, -1), self.present.expand(items, -1))


Encoder = Callable[[Sequence[str]], T5Features]


def as_features(condition: Any, encoder: Encoder | None, name: str, shape: tuple[int | str, int]) -> T5Features:
    """What a generator called `name` is told, as features of `shape`: strings through `encoder`, or features already.

    Raises InputError for anything else, and for features of another shape; a letter in `shape` is any number.
    """
    if isinstance(condition, str):
        condition = [condition]
    if isinstance(condition, (list, tuple)) and condition and all(isinstance(one, str) for one in condition):
        if encoder is None:
            raise InputError(
                f"{name} reads features of text; attach_text(T5Text()) lets it take strings such as "
                f"{condition[0]!r}, or pass T5Features"
            )
        condition = encoder(condition)
    if isinstance(condition, Tensor) and condition.ndim == 3:
        condition = T5Features(condition)
    if not isinstance(condition, T5Features):
        raise InputError(
            f"{name} takes prompts, or features (B, {shape[0]}, {shape[1]}), not {type(condition).__name__}"
        )
    found = tuple(condition.features.shape[1:])
    if any(isinstance(wanted, int) and wanted != number for wanted, number in zip(shape, found, strict=True)):
        raise InputError(f"text features {found}; {name} reads {shape[0], shape[1]}")
    return condition


class T5Text:
    """Texts to `T5Features` of `length` positions; longer texts are cut. Loaded when the first text is read.

    model   a Hub id, or a folder; LlamaGen's is FLAN-T5-XL, 2048 wide, 1.2 billion parameters
    length  T
    lower   letters become small ones, as LlamaGen was trained
    """

    def __init__(
        self,
        model: str = "google/flan-t5-xl",
        length: int = 120,
        *,
        lower: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.length, self.lower, self.device = model, length, lower, device
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> T5Features:
        """Features of each text, float32, zero where there is none.

        Raises MissingExtraError without transformers, VistokError when the model cannot be had, InputError for what is
        not text.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("expected a list of strings to read as text")
        tokenizer, encoder = self._parts()
        rows = tokenizer(
            [text.lower().strip() if self.lower else text for text in texts],
            max_length=self.length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = rows["input_ids"].to(self.device), rows["attention_mask"].to(self.device)
        features = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return to_the_right(features, mask.bool())

    def _parts(self) -> tuple[Any, Any]:
        if self._loaded is None:
            transformers = import_extra("transformers", "models")
            try:
                encoder = transformers.T5EncoderModel.from_pretrained(self.model).eval().requires_grad_(False)
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                raise VistokError(
                    f"cannot get the text model {self.model!r} ({str(error).splitlines()[0]}); check the network, name "
                    "a folder that holds it, or pass features (T5Features) instead of strings"
                ) from error
            self._loaded = tokenizer, encoder.to(self.device)
        return self._loaded


def to_the_right(features: Tensor, mask: Tensor) -> T5Features:
    """Features (B, T, width) whose padding stands at the end, with the padding before them, and zero."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    features = (features * mask[..., None]).gather(1, order[..., None].expand_as(features))
    return T5Features(features, mask.gather(1, order))
