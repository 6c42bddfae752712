"""HiMTok's claim at small scale: training on random prefixes makes the first tokens of a mask a coarse mask, for free.

    prefixes   each mask is decoded from a prefix of random length
    whole      the same network, always from all 16 tokens (TiTok over masks)
    box        a small transformer reads four tokens and tells the box: where the first ones say roughly where, it can

Masks are silhouettes of meshes from random views, 64 x 64; the test meshes are other shapes than those learnt.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vistok
from vistok.data.items import Item, Source
from vistok.data.masks import boxes_of
from vistok.data.silhouettes import silhouettes, surface
from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Reproduction, difference, of
from vistok.metrics.iou import boundary_iou, box_iou, iou
from vistok.registry import System, register
from vistok.reproductions._small import fit
from vistok.tokenizers.himtok import VARIANTS, HiMTok, HiMTokConfig

SIZE, VIEWS, TEST_VIEWS = 64, 6000, 500
HELD_OUT = ("beetle", "spot")  # meshes to test on
LENGTHS = (1, 2, 4, 8, 16)
READ, BINS, BOX_STEPS, BOX_BATCH = 4, 16, 500, 128
CONFIG = VARIANTS["himtok-silhouettes"]


class Silhouettes(Source):
    """Masks as PNG files in memory, drawn from meshes; the bytes depend on meshes and seed alone."""

    kind = "silhouettes"

    def __init__(self, meshes: Sequence[Path], count: int, seed: int) -> None:
        self.name, self._files = f"silhouettes of {len(meshes)} meshes", {}
        rng = np.random.RandomState(seed)
        for place, mesh in enumerate(meshes):
            share = count * (place + 1) // len(meshes) - count * place // len(meshes)
            for view, mask in enumerate(silhouettes(surface(mesh), share, SIZE, rng)):
                self._files[f"{mesh.stem}-{view:05d}"] = _png(mask[0])
        self._names = list(self._files)

    def __len__(self) -> int:
        return len(self._names)

    def item(self, index: int) -> Item:
        name = self._names[index]
        return Item(name, lambda: self._files[name])

    def _contents(self) -> Iterator[str]:
        for name, data in self._files.items():
            yield f"{name} {len(data)}"


def _png(mask: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((mask.numpy() * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sources(root: Path) -> Mapping[str, Source]:
    """Views of the meshes that are learnt from, of those that are not, and new views of the former."""
    meshes = sorted((root / "meshes").glob("*.obj"))
    held = [mesh for mesh in meshes if mesh.stem in HELD_OUT] or meshes[:1]
    seen = [mesh for mesh in meshes if mesh not in held]
    return {
        "train": Silhouettes(seen, VIEWS, seed=0),
        "test": Silhouettes(held, TEST_VIEWS, seed=1),
        "new views": Silhouettes(seen, TEST_VIEWS, seed=2),
    }


def masks_of(source: Source) -> Tensor:
    """All masks, float (n, 1, SIZE, SIZE), zeros and ones."""
    rows = [np.asarray(item.image)[..., 0] for item in source]
    return (torch.from_numpy(np.stack(rows)) >= 128).float()[:, None]


class Whole(HiMTok):
    """Always decoded from all tokens, as TiTok is."""

    system = "himtok-whole"

    def lengths(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.full((count,), self.config.tokens)


class BoxReader(nn.Module):
    """Codes (B, READ) to logits over bins of the four sides of the box (B, 4, BINS)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(CONFIG.codebook_size * READ, 64)  # a position has words of its own
        block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.sides = nn.Linear(64, 4 * BINS)

    def forward(self, codes: Tensor) -> Tensor:
        words = self.words(codes + CONFIG.codebook_size * torch.arange(READ))
        return self.sides(self.blocks(words).mean(1)).unflatten(1, (4, BINS))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy with the bins of the sides."""
        return {"sides": F.cross_entropy(self(batch["codes"]).flatten(0, 1), batch["bins"].flatten())}


def bins_of(boxes: Tensor) -> Tensor:
    """Boxes (n, 4) in pixels to bins (n, 4)."""
    return (boxes * BINS // SIZE).clamp(0, BINS - 1)


def rows_of(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end; all of them where they are fewer than `size`."""
    size = min(size, count)
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield from (rows for rows in torch.randperm(count, generator=rng).split(size) if len(rows) == size)


@torch.no_grad()
def examined(model: HiMTok, masks: Tensor) -> tuple[dict[str, float], Tensor]:
    """IoU at each length, boundary IoU at all tokens, codes in use; and the codes (n, N)."""
    codes: list[Tensor] = []
    values: dict[str, list[Tensor]] = {name: [] for name in (*(f"iou@{length}" for length in LENGTHS), "boundary")}
    for part in masks.split(100):
        tokens = model.encode(part)
        assert tokens.codes is not None
        codes.append(tokens.codes)
        for length in LENGTHS:
            found = model.decode(tokens.prefix(length), threshold=0.5)
            values[f"iou@{length}"].append(iou(found, part))
        values["boundary"].append(boundary_iou(found, part))
    numbers = {name: float(torch.cat(parts).mean()) for name, parts in values.items()}
    return numbers | {"codes": float(len(torch.cat(codes).unique()))}, torch.cat(codes)


def boxes_read(codes: Tensor, masks: Tensor, test_codes: Tensor, test_masks: Tensor, seed: int, tell: Any) -> float:
    """Mean IoU of test boxes with those that a reader of the first READ codes tells."""
    torch.manual_seed(seed)
    reader, bins = BoxReader(), bins_of(boxes_of(masks))

    def data() -> Iterator[dict[str, Any]]:
        for rows in rows_of(len(codes), BOX_BATCH, seed):
            yield {"codes": codes[rows, :READ], "bins": bins[rows]}

    fit(reader, reader.loss, data(), BOX_STEPS, lr=1e-3, seed=seed, tell=tell)
    with torch.no_grad():
        middle = (reader(test_codes[:, :READ]).argmax(2).float() + 0.5) * SIZE / BINS
    return float(box_iou(middle, boxes_of(test_masks).float()).mean())


def measured(seed: int, context: Context, *, name: str) -> dict[str, float]:
    """Train one arm; IoU over prefixes on new shapes and on new views of the learnt ones; boxes from four tokens."""
    masks, test = masks_of(context.data.train), masks_of(context.data.test)
    torch.manual_seed(seed)
    model = vistok.create(name)
    assert isinstance(model, HiMTok)

    def data() -> Iterator[dict[str, Any]]:
        rng = torch.Generator().manual_seed(seed)
        for rows in rows_of(len(masks), context.batch, seed):
            mirrored = torch.rand(len(rows), generator=rng) < 0.5
            part = masks[rows]
            yield {"pixels": torch.where(mirrored[:, None, None, None], part.flip(3), part)}

    model.initialise(data(), torch.Generator().manual_seed(seed))
    fit(model, model.loss, data(), context.steps, lr=RATE, seed=seed, tell=context.tell)
    found, test_codes = examined(model, test)
    views, _ = examined(model, masks_of(context.data.others["new views"]))
    codes = torch.cat([model.encode(part).codes for part in masks.split(100)])
    curve = [found[f"iou@{length}"] for length in LENGTHS]
    return found | {
        "largest fall": max(before - after for before, after in pairwise(curve)),
        "new views@4": views["iou@4"],
        "new views@16": views["iou@16"],
        "box": boxes_read(codes, masks, test_codes, test, seed, context.tell),
    }


RATE = 3e-3
register(System("himtok-whole", Whole, HiMTokConfig, {"himtok-whole": CONFIG}))

REPRODUCTION = Reproduction(
    slug="himtok",
    title="HiMTok: the first tokens are a coarse mask",
    claim="training on prefixes of random length gives usable masks, and boxes, from few tokens, at no cost at full "
    "length",
    source="arXiv:2503.13026, sections 3.1 and 4.4",
    checked="silhouettes of nine meshes from random views, 64 x 64, tested on two other meshes; 16 tokens. "
    "Segmentation by a language model, the paper's headline, is not checked. Batches of 32 and 600 steps, to take "
    "minutes. Silhouettes are easy: boundary IoU is reported too, and IoU on new views of the shapes learnt",
    baseline="whole",
    arms={
        "prefixes": Arm("a prefix of random length for each mask", partial(measured, name="himtok-silhouettes"), 4),
        "whole": Arm("all tokens, always", partial(measured, name="himtok-whole"), 4),
    },
    rule=(
        Condition("IoU from 4 tokens over whole", difference("iou@4", "prefixes", "whole"), at_least=0.15),
        Condition("IoU lost by more tokens, at most", of("prefixes", "largest fall"), at_most=0.01),
        Condition("IoU from all tokens over whole", difference("iou@16", "prefixes", "whole"), at_least=-0.02),
        Condition("box IoU from 4 tokens over whole", difference("box", "prefixes", "whole"), at_least=0.05),
        Condition("valid: codes in use with prefixes", of("prefixes", "codes"), at_least=50),
        Condition("valid: codes in use, whole", of("whole", "codes"), at_least=50),
    ),
    steps=600,
    batch=32,
    report=("iou@1", "iou@2", "iou@4", "iou@8", "iou@16", "boundary", "new views@4", "new views@16", "box", "codes"),
    train="meshes",
    test="meshes",
    sources=sources,
)
