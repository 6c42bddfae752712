"""What reproductions on small pictures share: pixels in memory, a small convolutional autoencoder, a training loop.

pixels (B, 3, S, S) in [0, 1] -> L stride-2 convolutions, residual blocks -> latent (B, D, S / 2^L, S / 2^L) -> back
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vistok.files import write_atomically

if TYPE_CHECKING:
    from vistok.evaluation.reproducing import Context


def shared(context: "Context", name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What all arms and seeds of a reproduction use: made once, then read from `shared/NAME.pt` of its folder."""
    path = context.folder.parents[1] / "shared" / f"{name}.pt"
    if not path.exists():
        found = make()
        write_atomically(path, lambda place: torch.save(found, place))
    return torch.load(path, weights_only=True)


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class SmallEncoder(nn.Sequential):
    """Pixels in [0, 1] to a latent of `dim` channels; each width halves the sides."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        parts: list[nn.Module] = []
        for entering, width in zip((3, *widths[:-1]), widths, strict=True):
            parts += [nn.Conv2d(entering, width, 4, stride=2, padding=1), Residual(width)]
        super().__init__(*parts, nn.SiLU(), nn.Conv2d(widths[-1], dim, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels * 2 - 1)


class SmallDecoder(nn.Sequential):
    """The encoder's mirror."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        parts: list[nn.Module] = [nn.Conv2d(dim, widths[-1], 1)]
        for width, leaving in zip(reversed(widths), (*reversed(widths[:-1]), 3), strict=True):
            parts += [Residual(width), nn.SiLU(), nn.ConvTranspose2d(width, leaving, 4, stride=2, padding=1)]
        super().__init__(*parts)

    def forward(self, latent: Tensor) -> Tensor:
        return (super().forward(latent) + 1) / 2


def batches(pixels: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches without end, in an order that the seed decides; pixels float in [0, 1], half of them mirrored.

    Of fewer pictures than `size` all of them are a batch.
    """
    size = min(size, len(pixels))
    rng = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(pixels), generator=rng).split(size):
            if len(rows) == size:
                part = pixels[rows].float() / 255
                mirrored = torch.rand(size, generator=rng) < 0.5
                part = torch.where(mirrored[:, None, None, None], part.flip(3), part)
                yield {"pixels": part, "label": labels[rows]}


def fit(
    module: nn.Module,
    loss: Callable[[dict[str, Any], int, torch.Generator], dict[str, Tensor]],
    data: Iterator[dict[str, Any]],
    steps: int,
    *,
    lr: float = 1e-3,
    seed: int = 0,
    bf16: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Adam with a short warm-up and a cosine to a twentieth; tells the total every tenth of the way.

    `bf16` computes the loss in autocast, several times faster on processors with bf16 matrix units; attention is then
    plain matrix products, whose backward pass is faster there than the fused one's for short sequences.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    rng = torch.Generator().manual_seed(seed)
    warmup = max(steps // 20, 1)

    def rate(step: int) -> float:
        progress = torch.tensor(step / steps)
        return min(1.0, (step + 1) / warmup) * float(0.525 + 0.475 * torch.cos(torch.pi * progress))

    module.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            sdpa_kernel(SDPBackend.MATH) if bf16 else nullcontext(),
        ):
            total = torch.stack(list(loss(next(data), step, rng).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(steps // 10, 1) == 0:
            tell(f"  step {step + 1} of {steps}: {total.item():.4f}")
    module.eval()


RIDGE = 1e-2


def probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Accuracy, in percent, of a linear map fitted by least squares to one-hot labels, on features (n, W)."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    train, test = ((part - mean) / deviation for part in (features, test_features))
    train, test = (F.pad(part, (0, 1), value=1.0).double() for part in (train, test))
    target = F.one_hot(labels).double()
    gram = train.T @ train / len(train) + RIDGE * torch.eye(train.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, train.T @ target / len(train))
    return 100 * float((test @ weights).argmax(1).eq(test_labels).double().mean())


FEATURE = 64


class Teacher(nn.Module):
    """A small classifier of ten classes; its pooled features (B, 64) teach, and tell pictures apart."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = SmallEncoder((32, 64, 64), FEATURE)
        self.classify = nn.Linear(FEATURE, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.silu(self.trunk(pixels)).mean((2, 3))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy with the labels."""
        return {"cross_entropy": F.cross_entropy(self.classify(self(batch["pixels"])), batch["label"])}


def teacher(context: "Context", pixels: Tensor, labels: Tensor, steps: int) -> Teacher:
    """A frozen `Teacher`, trained once for all arms and seeds."""

    def make() -> dict[str, Tensor]:
        torch.manual_seed(0)
        made = Teacher()
        context.tell(f"feature network: {steps} steps")
        fit(made, made.loss, batches(pixels, labels, context.batch, 0), steps, tell=context.tell)
        return made.state_dict()

    found = Teacher()
    found.load_state_dict(shared(context, "teacher", make))
    return found.requires_grad_(False).eval()
