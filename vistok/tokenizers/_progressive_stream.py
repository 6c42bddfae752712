"""What compressed files ask of vistok-progressive: pixels or codes to one embedded stream, and any part of it back.

The interface is `vistok.compressed.EmbeddedStream`. The prior always runs in float32 on the CPU, where its arithmetic
is exact; transform and decoder run where the model is.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.layout import Size
from vistok.nn.lapped import BLOCK
from vistok.tokenizers._progressive_coding import Planes, StreamReader, StreamWriter, walk
from vistok.tokenizers._progressive_prior import PlanePrior


class PlaneStream:
    """One picture as an embedded stream of bit planes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.planes: int = tokenizer.config.planes

    def encode(
        self,
        pixels: Tensor,
        *,
        segments: int | None = None,
        budget: int | None = None,
        enough: Callable[[Planes, int], bool] | None = None,
    ) -> tuple[bytes, int]:
        """Pixels (1, 3, H, W) of a legal size to a stream and the number of its symbols.

        segments: planes, all by default. budget: at most so many bytes. enough: asked after every plane, with what is
        known and the bytes so far; ends the stream when true.
        """
        count = segments or self.planes
        with self.tokenizer.inference():
            latent = self.tokenizer.latent(pixels)[0]
            target = (latent / self.tokenizer.config.step(count - 1)).trunc_().to(torch.int32).cpu()
        return self._write(target, count, budget, enough)

    def encode_codes(self, codes: Tensor, size: Size) -> tuple[bytes, int]:
        """Codes (1, n, C) of whole planes of a picture of `size` pixels, in the same way."""
        shape = (size[0] // BLOCK, size[1] // BLOCK)
        parts = codes.split(shape[0] * shape[1], 1)
        planes = [part.transpose(1, 2).unflatten(2, shape) for part in parts]
        return self._write(self.tokenizer.quantizer.decode(planes)[0].cpu(), len(planes), None, None)

    def decode(self, data: bytes, symbols: int, size: Size, partial: bool = False) -> Planes:
        """What a stream says of a picture of `size` pixels; with `partial`, what the first bytes of one say.

        Raises MismatchError where a checksum is wrong, FormatError for what no writer writes.
        """
        grid = (size[0] // BLOCK, size[1] // BLOCK)
        planes = Planes.nothing(grid, self.tokenizer.config.channels)
        if not symbols or (partial and not data):
            return planes
        reader = StreamReader(data, symbols, partial)
        walk(self._prior(), planes, reader, self.planes)
        if not partial:
            reader.check(planes.checksum() & 0xFFFF, 1 << 16)
        return planes

    def pixels(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        """The picture, (1, 3, H, W)."""
        with self.tokenizer.inference():
            maps = (self._map(part, planes.size) for part in (planes.fine, planes.coarse, planes.known))
            return self.tokenizer.render(*maps, planes.plane, dtype)

    def codes(self, planes: Planes) -> Tensor:
        """The codes, long (1, n, C), of all planes that were begun; -1 where the last was not sent."""
        done = planes.coarse[None].transpose(1, 2)  # (1, C, P), signed indices at the plane before
        found = []
        for plane in range(planes.plane):
            here = done.abs() >> (planes.plane - 1 - plane)
            found.append(torch.where(here > 1, here & 1, here * torch.where(done < 0, 2, 1)))
        fine = planes.fine[None].transpose(1, 2)
        last = torch.where(done != 0, fine.abs() & 1, torch.where(fine < 0, 2, fine))
        found.append(torch.where(planes.known[None].transpose(1, 2), last, -1))
        return torch.cat(found, 2).transpose(1, 2).long()

    def _write(self, target: Tensor, count: int, budget: int | None, enough: Any) -> tuple[bytes, int]:
        room, prior, rows = budget, self._prior(), target.flatten(1).T.contiguous()
        while True:
            planes = Planes.nothing((target.shape[1], target.shape[2]), len(target))
            writer = StreamWriter(rows, count, room)
            walk(prior, planes, writer, count, enough)
            writer.check(planes.checksum() & 0xFFFF, 1 << 16)
            data = writer.bytes()
            if budget is None or len(data) <= budget or not planes.symbols:
                return data, planes.symbols
            room = room - 1 if room else 0  # the writer foresees the stream's end up to a byte or two

    def _map(self, rows: Tensor, size: Size) -> Tensor:
        return rows.T.reshape(1, rows.shape[1], *size)

    def _prior(self) -> PlanePrior:
        prior: PlanePrior = self.tokenizer.prior
        if prior.offset.device.type == "cpu" and prior.offset.dtype == torch.float32 and not prior.training:
            return prior
        return copy.deepcopy(prior).to("cpu", torch.float32).eval()
