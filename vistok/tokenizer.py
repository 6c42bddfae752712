"""The contract of tokenizers: pixels <-> Tokens, through three stages that can be called, tested and swapped alone.

    pixels (B, C, H, W) --encoder--> latent --quantizer--> codes or vectors --> Tokens
    Tokens --> codes or vectors --quantizer.decode--> vectors --decoder--> pixels

A system sets `spec` and the three stages. Where its data flow is another one (several tensors between stages,
sampling decoders, tokens that are not a reshaped latent), it overrides `tokenize` and `detokenize`; `encode` and
`decode`, which deal with images, sizes, canvases and provenance, stay the same for all.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vistok.errors import InputError, MismatchError
from vistok.layout import Canvas, TokenSpec
from vistok.model import Model
from vistok.pieces import groups, interleave, per_item_seeds, pick, separate
from vistok.pixels import OnSize, as_float, as_uint8, fit, group_by_canvas, plan, restore, to_pixels
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

    def encode(
        self,
        images: Any,
        *,
        on_size: OnSize = "pad",
        rate: float | None = None,
        seed: int | Sequence[int] = 0,
        batch_invariant: bool = False,
        **conditions: Any,
    ) -> Any:
        """Images or clips to tokens.

        `images`: a PIL image, a uint8 array (H, W, C), a tensor (B, C, H, W) or (C, H, W), uint8 or float in [0, 1],
        or a list of these in any sizes. `on_size` says what happens to a size that is not legal (`spec.sizes`):
        "pad" it (the canvas travels along, decoding cuts it off), "refuse", "resize", or "tile". `seed` (one, or one
        per item) draws the noise of systems that have any. `conditions` are what `spec.needs.encode` names.

        Clips are tensors (B, C, T, H, W); `rate`, in frames per second, travels along. One that is longer than the
        model's window is cut into windows that are encoded alone, the last one padded and cut back in decoding, unless
        `on_size` is "refuse". Models of pictures take clips frame by frame. `encode_windows` takes them from a stream.

        `batch_invariant` encodes every item alone, so that its codes do not depend on what else is in the batch:
        kernels for another number of rows round differently, and a latent between two codes then flips. It costs the
        speed that batches give; `vistok eval --stability` measures both.

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
        by_canvas = group_by_canvas(batches, self.spec.sizes, on_size, clips=self.spec.clips, rate=rate)
        parts: list[Tokens | None] = [None] * len(batches)
        with self.inference():
            for canvas, members in by_canvas.items():
                rows = [row for member in members for row in range(member, member + batches[member].shape[0])]
                pixels = batches[members[0]] if len(members) == 1 else _stack(batches[member] for member in members)
                chosen = {name: pick(value, rows, len(seeds)) for name, value in conditions.items()}
                own = [seeds[row] for row in rows]
                if batch_invariant:
                    items = range(len(pixels))
                    apart = [{name: pick(value, [i], len(pixels)) for name, value in chosen.items()} for i in items]
                    alone = [self._encode_group(pixels[i : i + 1], canvas, [own[i]], apart[i]) for i in items]
                    tokens = Tokens.cat(alone)
                else:
                    tokens = self._encode_group(pixels, canvas, own, chosen)
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

        Returns (B, C, H, W), of clips (B, C, T, H, W), or a list of (C, H, W) when sizes differ (and for a list of
        Tokens).
        Raises MismatchError for tokens of another model, weights or layout; InputError for an illegal prefix.
        """
        self._check_conditions("decode", conditions)
        if not isinstance(tokens, Tokens):
            return [pixels for part in tokens for pixels in self.decode(part, seed=seed, dtype=dtype, **conditions)]
        self._check_source(tokens)
        seeds = per_item_seeds(seed, len(tokens))
        canvases = tokens.canvas or (self.spec.canvas,) * len(tokens)
        results: list[Tensor | None] = [None] * len(tokens)
        by_canvas: dict[Canvas, list[int]] = {}
        for row, canvas in enumerate(canvases):
            by_canvas.setdefault(canvas, []).append(row)
        with self.inference():
            for canvas, rows in by_canvas.items():
                group = tokens if len(by_canvas) == 1 else tokens[rows]
                chosen = {name: pick(value, rows, len(tokens)) for name, value in conditions.items()}
                pixels = self._decode_group(group, canvas, [seeds[row] for row in rows], dtype or self.dtype, chosen)
                if len(by_canvas) == 1:
                    return pixels
                for row, image in zip(rows, pixels, strict=True):
                    results[row] = image
        images = [image for image in results if image is not None]
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    def encode_windows(
        self,
        windows: Iterable[Tensor],
        *,
        rate: float | None = None,
        on_size: OnSize = "pad",
        seed: int = 0,
        **conditions: Any,
    ) -> Tokens:
        """One clip from a stream: the same tokens as `encode` of the whole, in the memory of a window.

        `windows` gives frames (1, C, t, H, W), `spec.window` of them at a time, the last ones fewer; a bare `Clip` of
        `vistok.data.video` does that. Raises InputError for windows of another length or size, or none.
        """
        self._check_conditions("encode", conditions)
        parts: list[TokenData] = []
        frames, last, size = 0, None, (0, 0)
        with self.inference():
            for window in windows:
                pixels = to_pixels(window, self.input_channels)
                if pixels.ndim != 5 or len(pixels) != 1 or (last and pixels.shape[-2:] != size):
                    raise InputError(f"a window of shape {tuple(pixels.shape)}; expected (1, C, t, H, W) of one size")
                if last not in (None, self.spec.window) or pixels.shape[2] > self.spec.window:
                    raise InputError(f"a window of {last or pixels.shape[2]} frames; expected {self.spec.window}")
                last, size = pixels.shape[2], (pixels.shape[-2], pixels.shape[-1])
                frames += last
                whole = self.spec.window if parts else None  # a clip that fits into one window may have a shorter one
                canvas = plan(size, self.spec.sizes, on_size, frames=last, clips=self.spec.clips, rate=rate)
                if whole:
                    canvas = replace(canvas, window=whole)
                parts.append(self._tokenize_pieces(pixels, canvas, [seed], conditions))
        if last is None:
            raise InputError("no frames to encode")
        canvas = plan(size, self.spec.sizes, on_size, frames=frames, clips=self.spec.clips, rate=rate)
        tiles = canvas.pieces // canvas.windows
        # (1, n * tiles) of every window, position first, to (windows * tiles, n), to (1, n * windows * tiles)
        apart = [[separate(tensor, tiles) for tensor in part] for part in parts]
        data = TokenData(*(interleave(tensors, canvas.pieces) for tensors in zip(*apart, strict=True)))
        return self._tokens(data, canvas, 1)

    def decode_windows(
        self, tokens: Tokens, *, seed: int = 0, dtype: torch.dtype | None = None, **conditions: Any
    ) -> Iterator[Tensor]:
        """The frames of one clip, (1, C, t, H, W) of a window at a time: `decode` in the memory of a window."""
        self._check_conditions("decode", conditions)
        self._check_source(tokens)
        canvas = tokens.canvas[0] if tokens.canvas else self.spec.canvas
        if len(tokens) != 1 or canvas.frames is None or canvas.window is None:
            raise InputError(f"{len(tokens)} items of {canvas.frames} frames; expected the tokens of one clip")
        self.spec.of(canvas).check_prefix(tokens.length)
        tiles = canvas.pieces // canvas.windows
        apart = [separate(tensor, canvas.pieces) for tensor in (tokens.codes, tokens.vectors, tokens.keep)]
        for index in range(canvas.windows):
            frames = min(canvas.window, canvas.frames - index * canvas.window)
            own = replace(canvas, frames=frames)
            part = slice(index * tiles, (index + 1) * tiles)
            data = TokenData(*(None if t is None else interleave([t[part]], tiles) for t in apart))
            with self.inference():
                window = self._tokens(data, own, 1)
                yield self._decode_group(window, own, [seed], dtype or self.dtype, conditions)

    def embed(self, tokens: Tokens) -> Tensor:
        """The vectors that a language model reads in place of the tokens, float (B, n, D)."""
        self._check_source(tokens)
        with self.inference():
            moved = tokens.to(self.device)
            if moved.vectors is not None:
                return moved.vectors
            return self.quantizer.decode(_present(moved))  # type: ignore[operator]

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
        layout = spec.single
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
        data = self._tokenize_pieces(pixels, canvas, seeds, conditions)
        return self._tokens(data, canvas, len(pixels))

    def _tokens(self, data: TokenData, canvas: Canvas, items: int) -> Tokens:
        return Tokens(
            segments=self.spec.of(canvas).segments,
            codes=None if data.codes is None else data.codes.long(),
            vectors=data.vectors,
            keep=data.keep,
            canvas=(canvas,) * items,
            source=self.source,
        )

    def _tokenize_pieces(
        self, pixels: Tensor, canvas: Canvas, seeds: list[int], conditions: dict[str, Any]
    ) -> TokenData:
        single = self.spec.at(canvas.tile, frames=canvas.window)
        fitted = fit(pixels, canvas, blank=self.spec.modality == "mask", clips=self.spec.clips is not None)
        if canvas.pieces == 1:
            return self.tokenize(fitted, single, seeds=seeds, **conditions)
        parts = [
            self.tokenize(fitted[part], single, seeds=own_seeds, **own)
            for part, own_seeds, own in groups(len(fitted), canvas.pieces, seeds, conditions)
        ]
        return TokenData(*(interleave(tensors, canvas.pieces) for tensors in zip(*parts, strict=True)))

    def _decode_group(
        self, tokens: Tokens, canvas: Canvas, seeds: list[int], dtype: torch.dtype, conditions: dict[str, Any]
    ) -> Tensor:
        spec = self.spec.of(canvas)
        if tokens.segments != spec.segments:
            raise MismatchError(f"the tokens' layout is not this model's at {canvas.tile}: {tokens.segments}")
        spec.check_prefix(tokens.length)
        moved = tokens.to(self.device)
        self._check_codes(moved)
        data = TokenData(_present(moved), moved.vectors, moved.keep)
        single = self.spec.at(canvas.tile, frames=canvas.window)
        if canvas.pieces == 1:
            pixels = self.detokenize(data, single, seeds=seeds, dtype=dtype, **conditions)
        else:
            apart = [separate(part, canvas.pieces) for part in data]
            done = []
            for part, own_seeds, own in groups(len(tokens) * canvas.pieces, canvas.pieces, seeds, conditions):
                chosen = TokenData(*(None if tensor is None else tensor[part] for tensor in apart))
                done.append(_as_dtype(self.detokenize(chosen, single, seeds=own_seeds, dtype=dtype, **own), dtype))
            pixels = torch.cat(done)
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


def _stack(batches: Any) -> Tensor:
    pixels = list(batches)
    if len({part.dtype for part in pixels}) > 1:
        pixels = [as_float(part) for part in pixels]
    return torch.cat(pixels)


def _present(tokens: Tokens) -> Tensor | None:
    """Codes with 0 where `keep` says that nothing is: files and generators may have left anything there, such as -1."""
    if tokens.codes is None or tokens.keep is None:
        return tokens.codes
    absent = ~tokens.keep if tokens.codes.ndim == 2 else ~tokens.keep[..., None]
    return tokens.codes.masked_fill(absent, 0)


def _as_sequence(latent: Tensor) -> Tensor:
    return latent.flatten(2).transpose(1, 2) if latent.ndim == 4 else latent


def _as_dtype(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return as_uint8(pixels) if dtype == torch.uint8 else as_float(pixels, dtype)
