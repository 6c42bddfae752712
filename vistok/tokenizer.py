"""The contract of tokenizers: pixels <-> Tokens, through three stages that can be called, tested and swapped alone.

    pixels (B, C, H, W) --encoder--> latent --quantizer--> codes or vectors --> Tokens
    Tokens --> codes or vectors --quantizer.decode--> vectors --decoder--> pixels

A system sets `spec` and the three stages. Where its data flow is another one (several tensors between stages,
sampling decoders, tokens that are not a reshaped latent), it overrides `tokenize` and `detokenize`; `encode` and
`decode`, which deal with images, sizes, canvases and provenance, stay the same for all.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vistok.errors import InputError, MismatchError
from vistok.layout import Canvas, TokenSpec
from vistok.model import Model
from vistok.pixels import OnSize, as_float, as_uint8, fit, group_by_canvas, restore, to_pixels
from vistok.tokens import Source, Tokens


class TokenData(NamedTuple):
    """What `tokenize` gives and `detokenize` takes: codes (B, n[, C]) or vectors (B, n, D), and keep (B, n)."""

    codes: Tensor | None = None
    vectors: Tensor | None = None
    keep: Tensor | None = None


class Tokenizer(Model):
    """Base of all tokenizers; see the module's docstring."""

    role: ClassVar[str] = "tokenizer"
    spec: TokenSpec
    encoder: nn.Module
    quantizer: nn.Module
    decoder: nn.Module

    # -- for users -----------------------------------------------------------------------------------------------

    def encode(self, images: Any, *, on_size: OnSize = "pad", seed: int | Sequence[int] = 0, **conditions: Any) -> Any:
        """Images to tokens.

        `images`: a PIL image, a uint8 array (H, W, C), a tensor (B, C, H, W) or (C, H, W), uint8 or float in [0, 1],
        or a list of these in any sizes. `on_size` says what happens to a size that is not legal (`spec.sizes`):
        "pad" it (the canvas travels along, decoding cuts it off), "refuse", "resize", or "tile". `seed` (one, or one
        per item) draws the noise of systems that have any. `conditions` are what `spec.needs.encode` names.

        Returns Tokens; for a list of images whose layouts differ, a list with one Tokens per image.
        Raises InputError for pixels, sizes or conditions that do not fit.
        """
        self._check_conditions("encode", conditions)
        channels = self.input_channels
        batches = [to_pixels(image, channels) for image in (images if isinstance(images, (list, tuple)) else [images])]
        if not batches:
            raise InputError("no images to encode")
        if isinstance(images, (list, tuple)) and any(batch.shape[0] != 1 for batch in batches):
            raise InputError("a list holds single images; pass one (B, C, H, W) tensor for a batch")
        seeds = per_item_seeds(seed, sum(batch.shape[0] for batch in batches))
        groups = group_by_canvas(batches, self.spec.sizes, on_size, channels)
        parts: list[Tokens | None] = [None] * len(batches)
        with self.inference():
            for canvas, members in groups.items():
                rows = [row for member in members for row in range(member, member + batches[member].shape[0])]
                pixels = batches[members[0]] if len(members) == 1 else _stack(batches[member] for member in members)
                chosen = {name: _pick(value, rows, len(seeds)) for name, value in conditions.items()}
                tokens = self._encode_group(pixels, canvas, [seeds[row] for row in rows], chosen)
                if len(members) == 1:
                    parts[members[0]] = tokens
                else:
                    for place, member in enumerate(members):
                        parts[member] = tokens[place]
        done = [part for part in parts if part is not None]
        if len(done) == 1:
            return done[0]
        return Tokens.cat(done) if len({(part.segments, part.length) for part in done}) == 1 else done

    def decode(
        self,
        tokens: "Tokens | Sequence[Tokens]",
        *,
        seed: int | Sequence[int] = 0,
        dtype: torch.dtype | None = None,
        **conditions: Any,
    ) -> Any:
        """Tokens to pixels in [0, 1], each item of the size that went in.

        Takes what `encode` gave, a prefix of it (a length in `spec.prefixes`), or what a generator made. `dtype` is
        the type of the result: the model's by default, torch.uint8 for 0..255. Conditions as `spec.needs.decode`.

        Returns (B, C, H, W), or a list of (C, H, W) when sizes differ (and for a list of Tokens).
        Raises MismatchError for tokens of another model, weights or layout; InputError for an illegal prefix.
        """
        self._check_conditions("decode", conditions)
        if not isinstance(tokens, Tokens):
            return [pixels for part in tokens for pixels in self.decode(part, seed=seed, dtype=dtype, **conditions)]
        self._check_source(tokens)
        seeds = per_item_seeds(seed, len(tokens))
        canvases = tokens.canvas or (Canvas(self.spec.size),) * len(tokens)
        results: list[Tensor | None] = [None] * len(tokens)
        groups: dict[Canvas, list[int]] = {}
        for row, canvas in enumerate(canvases):
            groups.setdefault(canvas, []).append(row)
        with self.inference():
            for canvas, rows in groups.items():
                group = tokens if len(groups) == 1 else tokens[rows]
                chosen = {name: _pick(value, rows, len(tokens)) for name, value in conditions.items()}
                pixels = self._decode_group(group, canvas, [seeds[row] for row in rows], dtype or self.dtype, chosen)
                if len(groups) == 1:
                    return pixels
                for row, image in zip(rows, pixels, strict=True):
                    results[row] = image
        images = [image for image in results if image is not None]
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    def embed(self, tokens: Tokens) -> Tensor:
        """The vectors that a language model reads in place of the tokens, float (B, n, D)."""
        self._check_source(tokens)
        with self.inference():
            moved = tokens.to(self.device)
            return moved.vectors if moved.vectors is not None else self.quantizer.decode(moved.codes)  # type: ignore[operator]

    def forward(self, pixels: Tensor, **conditions: Any) -> Tensor:
        """Reconstruction (B, C, H, W) of pixels in [0, 1] of a legal size, differentiable where the system is."""
        latent = self.encoder(self.prepare(pixels), **conditions)
        quantized = self.quantizer(_as_sequence(latent))
        spec = self.spec.at(tuple(pixels.shape[-2:]))  # type: ignore[arg-type]
        return self.decoder(self.arrange(quantized.vectors, spec), **conditions)

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Training terms for one batch (`batch["pixels"]` in [0, 1]); their sum is minimised. Systems define it."""
        raise TypeError(f"{type(self).__name__} does not define a training loss")

    # -- for systems ---------------------------------------------------------------------------------------------

    @property
    def input_channels(self) -> int:
        """Channels of what is encoded: 1 for masks, 3 otherwise."""
        return 1 if self.spec.modality == "mask" else 3

    def tokenize(self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], **conditions: Any) -> TokenData:
        """Pixels of a legal size (uint8 or float, on any device) to token data, all positions."""
        latent = self.encoder(self.prepare(pixels), **conditions)
        return TokenData(codes=self.quantizer.encode(_as_sequence(latent)))  # type: ignore[operator]

    def detokenize(
        self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype, **conditions: Any
    ) -> Tensor:
        """Token data, perhaps a legal prefix, to pixels (B, C, H, W): float in [0, 1], or uint8 if `dtype` is that."""
        vectors = data.vectors if data.vectors is not None else self.quantizer.decode(data.codes)  # type: ignore[operator]
        return self.decoder(self.arrange(vectors, spec), **conditions).clamp(0, 1)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels as float in [0, 1], in the model's dtype and on its device."""
        return as_float(pixels.to(self.device), self.dtype)

    def arrange(self, vectors: Tensor, spec: TokenSpec) -> Tensor:
        """(B, n, D) to what the decoder takes: a map (B, D, h, w) where the layout is one grid, else unchanged."""
        layout = spec.layout(spec.size)
        if len(layout) == 1 and len(layout[0].shape) == 2:
            return vectors.transpose(1, 2).unflatten(2, layout[0].shape)
        return vectors

    @contextmanager
    def inference(self):
        """Evaluation mode without gradients, put back afterwards: encoding never updates a codebook."""
        training = [module for module in self.modules() if module.training]
        try:
            self.eval()
            with torch.no_grad():
                yield self
        finally:
            for module in training:
                module.training = True

    # -- inside --------------------------------------------------------------------------------------------------

    def _encode_group(self, pixels: Tensor, canvas: Canvas, seeds: list[int], conditions: dict[str, Any]) -> Tokens:
        tiles = canvas.tiles[0] * canvas.tiles[1]
        spec = self.spec.at(canvas.tile, canvas.tiles)
        single = self.spec.at(canvas.tile)
        fitted = fit(pixels, canvas, blank=self.spec.modality == "mask")
        if tiles == 1:
            data = self.tokenize(fitted, single, seeds=seeds, **conditions)
        else:
            repeated = {name: _repeat(value, tiles) for name, value in conditions.items()}
            chunks = [
                self.tokenize(
                    fitted[start : start + TILES_AT_ONCE],
                    single,
                    seeds=[seeds[tile // tiles] for tile in range(start, min(start + TILES_AT_ONCE, len(fitted)))],
                    **{name: _slice(value, start, start + TILES_AT_ONCE) for name, value in repeated.items()},
                )
                for start in range(0, len(fitted), TILES_AT_ONCE)
            ]
            data = TokenData(*(_interleave(parts, tiles) for parts in zip(*chunks, strict=True)))
        return Tokens(
            segments=spec.segments,
            codes=None if data.codes is None else data.codes.long(),
            vectors=data.vectors,
            keep=data.keep,
            canvas=(canvas,) * len(pixels),
            source=self.source,
        )

    def _decode_group(
        self, tokens: Tokens, canvas: Canvas, seeds: list[int], dtype: torch.dtype, conditions: dict[str, Any]
    ) -> Tensor:
        spec = self.spec.at(canvas.tile, canvas.tiles)
        if tokens.segments != spec.segments:
            raise MismatchError(f"the tokens' layout is not this model's at {canvas.tile}: {tokens.segments}")
        spec.check_prefix(tokens.length)
        moved = tokens.to(self.device)
        self._check_codes(moved)
        data = TokenData(moved.codes, moved.vectors, moved.keep)
        tiles = canvas.tiles[0] * canvas.tiles[1]
        single = self.spec.at(canvas.tile)
        if tiles == 1:
            pixels = self.detokenize(data, single, seeds=seeds, dtype=dtype, **conditions)
        else:
            apart = [_separate(part, tiles) for part in data]
            repeated = {name: _repeat(value, tiles) for name, value in conditions.items()}
            total = len(tokens) * tiles
            pixels = torch.cat(
                [
                    _as_dtype(
                        self.detokenize(
                            TokenData(
                                *(None if part is None else part[start : start + TILES_AT_ONCE] for part in apart)
                            ),
                            single,
                            seeds=[seeds[tile // tiles] for tile in range(start, min(start + TILES_AT_ONCE, total))],
                            dtype=dtype,
                            **{name: _slice(value, start, start + TILES_AT_ONCE) for name, value in repeated.items()},
                        ),
                        dtype,
                    )
                    for start in range(0, total, TILES_AT_ONCE)
                ]
            )
        return _as_dtype(restore(pixels, canvas, self.spec.output.scale), dtype)

    @property
    def source(self) -> Source:
        """What tokens made by this model say about it."""
        return Source(self.name, self.fingerprint, self.preprocessing, str(self.dtype).removeprefix("torch."))

    def _check_source(self, tokens: Tokens) -> None:
        made_by = tokens.source
        if made_by is None:
            return
        if made_by.weights != self.fingerprint:
            raise MismatchError(
                f"these tokens were made by {made_by.name!r} (weights {made_by.weights[:8]}), "
                f"not by this {self.name!r} (weights {self.fingerprint[:8]}); load the model that made them"
            )
        if made_by.preprocessing != self.preprocessing:
            raise MismatchError(
                f"these tokens' preprocessing is {made_by.preprocessing!r}, here {self.preprocessing!r}"
            )

    def _check_codes(self, tokens: Tokens) -> None:
        if tokens.codes is None:
            return
        for columns, first, last in tokens._columns():
            for column, size in columns:
                values = tokens._column(column, first, last)
                if values.numel() and int(values.max()) >= size:
                    raise InputError(
                        f"code {int(values.max())} at positions {first}..{last - 1}, where the codebook has {size}"
                    )

    def _check_conditions(self, verb: str, conditions: dict[str, Any]) -> None:
        missing = [name for name in getattr(self.spec.needs, verb) if conditions.get(name) is None]
        if missing:
            raise InputError(f"{self.name} cannot {verb} without {', '.join(missing)}: pass {missing[0]}=...")


TILES_AT_ONCE = 16


def per_item_seeds(seed: int | Sequence[int], items: int) -> list[int]:
    """One seed per item: an int serves every item, so that an item's noise does not depend on its batch."""
    if isinstance(seed, int):
        return [seed] * items
    if len(seed) != items:
        raise InputError(f"{len(seed)} seeds for {items} items")
    return list(seed)


def _stack(batches: Any) -> Tensor:
    pixels = list(batches)
    if len({part.dtype for part in pixels}) > 1:
        pixels = [as_float(part) for part in pixels]
    return torch.cat(pixels)


def _as_sequence(latent: Tensor) -> Tensor:
    return latent.flatten(2).transpose(1, 2) if latent.ndim == 4 else latent


def _as_dtype(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return as_uint8(pixels) if dtype == torch.uint8 else as_float(pixels, dtype)


def _is_per_item(value: Any, items: int) -> bool:
    return (
        isinstance(value, (list, tuple, Tensor))
        and len(value) == items
        and not (isinstance(value, Tensor) and value.ndim == 0)
    )


def _pick(value: Any, rows: list[int], items: int) -> Any:
    """The entries of a per-item condition that belong to `rows`; anything else serves all items as it is."""
    if not _is_per_item(value, items) or len(rows) == items:
        return value
    return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]


def _repeat(value: Any, tiles: int) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return value.repeat_interleave(tiles, 0)
    return [item for item in value for _ in range(tiles)] if isinstance(value, (list, tuple)) else value


def _slice(value: Any, start: int, stop: int) -> Any:
    return value[start:stop] if isinstance(value, (list, tuple, Tensor)) else value


def _interleave(parts: tuple[Tensor | None, ...], tiles: int) -> Tensor | None:
    """Tiles' tokens (B * tiles, n, ...) to (B, n * tiles, ...), position first: prefixes stay coarse to fine."""
    if parts[0] is None:
        return None
    data = torch.cat(parts)  # type: ignore[arg-type]
    return data.unflatten(0, (-1, tiles)).transpose(1, 2).flatten(1, 2)


def _separate(data: Tensor | None, tiles: int) -> Tensor | None:
    return None if data is None else data.unflatten(1, (-1, tiles)).transpose(1, 2).flatten(0, 1)
