"""What compressed files ask of vistok-progressive: pixels or codes to one embedded stream, and any part of it back.

The interface is `vistok.embedded.EmbeddedStream`. The prior always runs in float32 on the CPU, where its arithmetic
is exact; transform and decoder run where the model is.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.embedded import Encoded
from vistok.errors import FormatError
from vistok.layout import Size
from vistok.nn.lapped import BLOCK
from vistok.tokenizers._progressive_coding import Planes, walk
from vistok.tokenizers._progressive_prior import PlanePrior
from vistok.tokenizers._progressive_range import StreamReader, StreamWriter


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
    ) -> Encoded:
        """Pixels (1, 3, H, W) of a legal size to a stream.

        segments: planes, all by default. budget: so many bytes, less where all planes take less. enough: asked after
        every plane, with what is known and the bytes so far; ends the stream when true.
        """
        count = segments or self.planes
        with self.tokenizer.inference():
            target = self.tokenizer.latent(pixels)[0].div_(self.tokenizer.config.step(count - 1))
            target = target.trunc_().to(torch.int32).cpu()
        return self._write(target, count, budget, enough)

    def encode_codes(self, codes: Tensor, size: Size) -> Encoded:
        """Codes (1, n, C) of whole planes of a picture of `size` pixels, in the same way."""
        shape = (size[0] // BLOCK, size[1] // BLOCK)
        parts = codes.split(shape[0] * shape[1], 1)
        planes = [part.transpose(1, 2).unflatten(2, shape) for part in parts]
        return self._write(self.tokenizer.quantizer.decode(planes)[0].cpu(), len(planes), None, None)

    def decode(self, data: bytes, segments: int, size: Size) -> Planes:
        """What a stream, or the beginning of one, says of a picture of `size` pixels.

        segments: whole planes; 0: as many as the bytes hold. Raises MismatchError where a checksum is wrong,
        FormatError for more planes than the model has.
        """
        if segments > self.planes:
            raise FormatError(f"the compressed file holds {segments} planes, {self.tokenizer.name} has {self.planes}")
        grid = (size[0] // BLOCK, size[1] // BLOCK)
        planes = Planes.nothing(grid, self.tokenizer.config.channels)
        if data:
            walk(self._prior(), planes, StreamReader(data), segments or self.planes)
        return planes

    def check(self, planes: Planes) -> int:
        """32 bits of a checksum over everything that is known."""
        return planes.checksum()

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

    def _write(self, target: Tensor, count: int, budget: int | None, enough: Any) -> Encoded:
        channels, *size = target.shape
        planes = Planes.nothing((size[0], size[1]), channels)
        writer = StreamWriter(target.flatten(1).T.contiguous(), count, budget)
        walk(self._prior(), planes, writer, count, enough)
        data = writer.bytes(planes)
        planes.settle()
        whole = 0 if budget is not None or planes.plane + 1 == self.planes else planes.plane + 1
        return Encoded(data, whole, planes)

    def _map(self, rows: Tensor, size: Size) -> Tensor:
        return rows.T.reshape(1, rows.shape[1], *size)

    def _prior(self) -> PlanePrior:
        prior: PlanePrior = self.tokenizer.prior
        if prior.offset.device.type == "cpu" and prior.offset.dtype == torch.float32 and not prior.training:
            return prior
        return copy.deepcopy(prior).to("cpu", torch.float32).eval()
