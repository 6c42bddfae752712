"""Compressed clips: read and written window by window, so that memory holds a window of frames and the codes of all.

    clip = open_clip("clip.mp4")
    data = compress_clip(tok, clip.windows, rate=clip.rate)
    write_clip("again.mp4", decompress_windows(tok, data), rate=peek(data).rate)

The file's layout is in `vistok.compressed`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from vistok.compressed import _on_size, _within, pack, unpack
from vistok.embedded import psnr_of
from vistok.errors import FormatError, InputError
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

Windows = Callable[[int], Iterable[Tensor]]  # frames at a time -> (1, 3, t, H, W), from the first frame at every call


def compress_clip(
    tokenizer: Tokenizer,
    windows: Windows,
    *,
    rate: float | None = None,
    length: int | None = None,
    bpp: float | None = None,
    bytes: int | None = None,
    psnr: float | None = None,
) -> "bytes":
    """One clip to a compressed file. `windows(t)` gives its frames, t at a time; a `Clip`'s method does.

    `rate` is kept, in frames per second. `length`, `bpp`, `bytes` and `psnr` as in `compress`, bits per pixel over the
    pixels of all frames, PSNR as the mean over frames.

    Raises InputError for a tokenizer of pictures or of continuous tokens, or a target that is not reached.
    """
    given = {"length": length, "bpp": bpp, "bytes": bytes, "psnr": psnr}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"give {' or '.join(named)}, not {'both' if len(named) == 2 else 'all'}")
    spec = tokenizer.spec
    if spec.clips is None:
        raise InputError(f"{tokenizer.name} is a tokenizer of {spec.modality}s; a clip needs one of clips")
    if any(not segment.codebooks for segment in spec.segments):
        raise InputError(f"{tokenizer.name} has continuous tokens; only codes can be compressed")
    frames = iter(windows(spec.window))
    first = next(frames, None)
    if first is None:
        raise InputError("no frames to compress")
    on_size = _on_size(tokenizer, (first.shape[-2], first.shape[-1]))
    tokens = tokenizer.encode_windows(chain([first], frames), rate=rate, on_size=on_size)
    if psnr is not None:
        return _reaching(tokenizer, tokens, windows, psnr)
    if bpp is not None:
        canvas = tokens.canvas[0]
        bytes = int(bpp * canvas.size[0] * canvas.size[1] * (canvas.frames or 1) / 8)
    if bytes is not None:
        return _within(tokenizer, tokens, bytes)
    return pack(tokenizer, tokens if length is None else tokens.prefix(length))


def decompress_windows(tokenizer: Tokenizer, data: bytes) -> Iterator[Tensor]:
    """The frames of a compressed clip, uint8 (1, 3, t, H, W), a window at a time. Raises as `decompress`."""
    tokens = unpack(tokenizer, data)
    if tokens.canvas[0].frames is None:
        raise FormatError("this compressed file holds a picture, no clip")
    return tokenizer.decode_windows(tokens, dtype=torch.uint8)


def _reaching(tokenizer: Tokenizer, tokens: Tokens, windows: Windows, target: float) -> bytes:
    """The file of the shortest prefix whose frames have a mean PSNR of `target` dB."""
    for length in tokenizer.spec.of(tokens.canvas[0]).prefixes:
        part = tokens.prefix(length)
        pairs = zip(tokenizer.decode_windows(part, dtype=torch.uint8), windows(tokenizer.spec.window), strict=True)
        values = [psnr_of(ours[:, :, t].cpu(), theirs[:, :, t]) for ours, theirs in pairs for t in range(ours.shape[2])]
        reached = sum(values) / len(values)
        if reached >= target:
            return pack(tokenizer, part)
    raise InputError(f"{tokenizer.name} reaches {reached:.2f} dB on this clip, {target} dB were asked for")
