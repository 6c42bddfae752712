"""No quantizer holds an N x K matrix: the largest tensor it makes stays far below that."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vistok.quantize import IBQ, EntropyTerm, MultiScaleVectorQuantizer, Quantizer, ResidualVQ, SimVQ, VectorQuantizer

N, K, D = 16384, 2048, 4


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest storage that any operation gives, also in the backward pass."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


BUILD: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: VectorQuantizer(D, K),
    "vq-ema": lambda: VectorQuantizer(D, K, learning="ema", restart_below=1.0),
    "vq-cvq": lambda: VectorQuantizer(D, K, learning="cvq"),
    "vq-entropy": lambda: VectorQuantizer(D, K, metric="cosine", entropy=EntropyTerm()),
    "rvq": lambda: ResidualVQ(D, K, 2, learning="ema"),
    "simvq": lambda: SimVQ(D, K),
    "ibq": lambda: IBQ(D, K),
    "multiscale": lambda: MultiScaleVectorQuantizer(D, K, (1, 16, 128)),
}


@pytest.mark.parametrize("name", BUILD)
def test_no_n_by_k_matrix(name: str) -> None:
    torch.manual_seed(0)
    quantizer = BUILD[name]()
    z = torch.randn(1, N, D, requires_grad=True)
    with Largest() as largest:
        out = quantizer(z)
        (out.vectors.sum() + sum(out.losses.values())).backward()
    assert largest.elements <= N * K // 8
