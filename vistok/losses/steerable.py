"""A perceptual distance without learned weights: oriented filters at several scales, normalised by local contrast.

    pixels (B, 3, H, W) -> luminance and two colour differences -> at each scale: first and second derivatives of a
        Gaussian in several directions (steerable filters, Freeman and Adelson 1991) -> responses (B, F, h, w)
    structure: squared difference of responses over the local energy of both (as NLPD, Laparra et al. 2016)
    texture:   the same of amplitudes in small cells, whatever is where in them: what is blurred has lost amplitude

What it is worth was measured, see docs/training.md: it keeps edges and textures that a squared error alone blurs. It
knows nothing of objects, and LPIPS is better where its weights can be had.
"""

from math import cos, pi, sin

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.errors import ConfigError
from vistok.losses.perceptual import Perceptual

# luminance, blue against yellow, red against green
OPPONENTS = ((0.299, 0.587, 0.114), (-0.25, -0.25, 0.5), (0.5, -0.5, 0.0))
CHROMA = 0.5  # what a colour difference counts
CELL = 4  # side of the cells whose amplitudes are compared


class Steerable(Perceptual):
    """See the module's docstring.

    scales   octaves, from full resolution on; those below 8 pixels a side are left out
    texture  weight of the texture term beside the structure term
    floor    contrast, as a share of the full range, below which differences are not magnified
    """

    kernels: Tensor
    opponents: Tensor

    def __init__(self, scales: int = 4, texture: float = 1.0, floor: float = 0.03) -> None:
        super().__init__()
        if scales < 1 or texture < 0 or floor <= 0:
            raise ConfigError(f"needs scales >= 1, texture >= 0 and floor > 0, got {scales}, {texture} and {floor}")
        self.scales, self.texture, self.floor = scales, texture, floor
        self.register_buffer("kernels", filters(), persistent=False)
        self.register_buffer("opponents", torch.tensor(OPPONENTS), persistent=False)
        self.freeze()

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Responses of each scale, (B, 3, F, h, w)."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self._responses(pixels.float())

    def _responses(self, pixels: Tensor) -> list[Tensor]:
        x = torch.einsum("bchw,oc->bohw", pixels, self.opponents)
        found = []
        for scale in range(self.scales):
            if scale:
                if min(x.shape[-2:]) < 16:
                    break
                x = F.avg_pool2d(x, 2)
            flat = F.pad(x.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="reflect")
            found.append(F.conv2d(flat, self.kernels).unflatten(0, x.shape[:2]))
        return found

    def compare(self, found: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """(B,): the mean over scales, directions and positions."""
        return torch.stack([self._compare(a, b) for a, b in zip(found, wanted, strict=True)]).mean(0)

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        shares = a.new_tensor([1.0, CHROMA, CHROMA])
        least = self.floor**2
        squares_a, squares_b = a.square(), b.square()
        energy = _local((squares_a + squares_b).sum(2))  # (B, 3, h, w)
        each = ((a - b).square().sum(2) / (energy + least)).mean((2, 3))
        if self.texture:
            pooled = (F.avg_pool2d(squares.flatten(1, 2), CELL) for squares in (squares_a, squares_b))
            energy_a, energy_b = (energy.unflatten(1, a.shape[1:3]) for energy in pooled)
            amplitude = (energy_a + least).sqrt() - (energy_b + least).sqrt()
            each = each + self.texture * (amplitude.square() / (energy_a + energy_b + least)).mean((2, 3, 4))
        return (each * shares).sum(1) / shares.sum()


def filters() -> Tensor:
    """(F, 1, 5, 5): two first and three second derivatives of a Gaussian of deviation 1, of unit energy."""
    axis = torch.arange(-2.0, 3.0)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bell = torch.exp(-(x.square() + y.square()) / 2)
    made = []
    for order, angles in ((1, (0.0, pi / 2)), (2, (0.0, pi / 3, 2 * pi / 3))):
        for angle in angles:
            along = x * cos(angle) + y * sin(angle)
            kernel = bell * (along if order == 1 else along.square() - 1)
            kernel = kernel - kernel.mean()
            made.append(kernel / kernel.abs().sum())
    return torch.stack(made)[:, None]


def _local(energy: Tensor) -> Tensor:
    """The mean over 5 x 5 neighbours, borders repeated, of (B, O, h, w)."""
    return F.avg_pool2d(F.pad(energy, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
