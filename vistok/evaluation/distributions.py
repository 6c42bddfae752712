"""Distances between the features of originals and of reconstructions or samples, over a data set that streams by.

    uint8 pixels --extractor--> features --Moments, or kept where a metric needs all--> {"fid": .., "is": .., ..}

| name | what | features | kept |
| --- | --- | --- | --- |
| fid | Frechet distance | the extractor's first | mean and covariance |
| sfid | Frechet distance | "spatial", Inception's alone | mean and covariance |
| is | Inception score of the second set | "logits_unbiased", Inception's alone | logits |
| kid | kernel distance, unbiased | the first | all features |
| precision, recall, density, coverage | manifolds, 3 neighbours | the first | all features |
| mind | sliced distance | the first | all features |

With DINOv2 for the extractor `fid` is FDD; of reconstructions it is rFID, of a generator's samples gFID.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vistok.errors import InputError, UnknownNameError, nearest
from vistok.metrics.extractors import Extractor
from vistok.metrics.frechet import frechet_distance
from vistok.metrics.inception_score import inception_score
from vistok.metrics.kernel import VARIANTS as KERNELS
from vistok.metrics.kernel import Subsets, kernel_distance
from vistok.metrics.manifold import manifolds
from vistok.metrics.moments import Moments
from vistok.metrics.sliced import sliced_distance

MANIFOLD = ("precision", "recall", "density", "coverage")
DISTANCES = ("fid", "sfid", "is", "kid", *MANIFOLD, "mind")
_WHOLE = {"kid", "mind", *MANIFOLD}


class Features:
    """What is kept of one set of images, for the metrics that were asked for."""

    def __init__(self, extractor: Extractor, metrics: Sequence[str]) -> None:
        self.extractor = extractor
        self.metrics = check_metrics(metrics, extractor)
        self.first, self.spatial = Moments(), Moments()
        self.rows: list[Tensor] = []
        self.logits: list[Tensor] = []
        self._names = (
            extractor.features[0],
            *(["spatial"] * ("sfid" in metrics)),
            *(["logits_unbiased"] * ("is" in metrics)),
        )

    def update(self, pixels: Tensor) -> None:
        """Add images, uint8 (B, 3, H, W)."""
        found = self.extractor(pixels, self._names)
        features = found[self.extractor.features[0]].cpu()
        self.first.update(features)
        if _WHOLE & set(self.metrics):
            self.rows.append(features)
        if "sfid" in self.metrics:
            self.spatial.update(found["spatial"].cpu())
        if "is" in self.metrics:
            self.logits.append(found["logits_unbiased"].cpu())

    @property
    def count(self) -> int:
        """Images seen."""
        return self.first.count


def distances(found: Features, real: Features) -> dict[str, float]:
    """The metrics that both were made for, `found` against `real`. Raises InputError for too few images."""
    if min(found.count, real.count) < 2:
        raise InputError(f"{found.count} and {real.count} images; distances between sets need at least two of each")
    wanted, values = found.metrics, {}
    if "fid" in wanted:
        values["fid"] = frechet_distance(found.first.gaussian(), real.first.gaussian())
    if "sfid" in wanted:
        values["sfid"] = frechet_distance(found.spatial.gaussian(), real.spatial.gaussian())
    if "is" in wanted:
        values["is"] = inception_score(torch.cat(found.logits), _score_variant(found))[0]
    if _WHOLE & set(wanted):
        ours, theirs = torch.cat(found.rows), torch.cat(real.rows)
        if "kid" in wanted:
            values["kid"] = kernel_distance(ours, theirs, _subsets(found.extractor, min(len(ours), len(theirs))))[0]
        if "mind" in wanted:
            values["mind"] = sliced_distance(ours, theirs)
        if set(MANIFOLD) & set(wanted):
            shares = manifolds(ours, theirs)
            values |= {name: getattr(shares, name) for name in MANIFOLD if name in wanted}
    return {name: values[name] for name in wanted}


def check_metrics(metrics: Iterable[str], extractor: Extractor) -> tuple[str, ...]:
    """The names, once each. Raises UnknownNameError for an unknown one, InputError for what the extractor lacks."""
    found = tuple(dict.fromkeys(metrics))
    for name in found:
        if name not in DISTANCES:
            raise UnknownNameError(f"no metric {name!r}{nearest(name, DISTANCES) or f'; there are {list(DISTANCES)}'}")
        needed = {"sfid": "spatial", "is": "logits_unbiased"}.get(name)
        if needed and needed not in extractor.features:
            raise InputError(f"{name} needs an Inception network; {extractor.name} gives {list(extractor.features)}")
    return found


def feature_protocol(metric: str, extractor: Extractor) -> dict[str, str | int]:
    """What a receipt says of the variant of a metric and of its features."""
    variant = {
        "is": "adm" if extractor.name == "inception:adm" else "torch-fidelity",
        "kid": "clean-fid" if extractor.name == "inception:clean-fid" else "torch-fidelity",
        "mind": "torch-fidelity",
    }.get(metric, "k3" if metric in MANIFOLD else extractor.name)
    protocol = extractor.protocol
    return {
        "variant": variant,
        "extractor": protocol["extractor"],
        "extractor weights": protocol["weights"],
        "extractor resize": protocol["resize"],
        "extractor side": protocol["side"],
    }


def _score_variant(found: Features) -> str:
    return str(feature_protocol("is", found.extractor)["variant"])


def _subsets(extractor: Extractor, smaller: int) -> Subsets:
    """The tool's own; its subsets are cut to the number of images, so that small sets have a KID too."""
    chosen = KERNELS[str(feature_protocol("kid", extractor)["variant"])]
    return Subsets(chosen.number, min(chosen.size, smaller), chosen.seed, chosen.second_first)
