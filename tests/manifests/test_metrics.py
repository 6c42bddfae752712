"""The FID Inception has every tensor of the published file, and no other."""

import torch

from tests.manifests.manifest import shapes
from vistok.nn.inception import FIDInception


def test_inception() -> None:
    with torch.device("meta"):
        state = FIDInception().state_dict()
    published = shapes("metrics", "fid-inception")
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in published.items()}
