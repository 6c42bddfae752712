"""What tokenizers on test pictures are compared by: error of the reconstruction, codes in use, a probe on the codes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vistok.evaluation.reproducing import Context
from vistok.metrics.codes import CodeStatistics
from vistok.metrics.psnr import psnr
from vistok.reproductions._small import probe
from vistok.tokenizer import Tokenizer

AT_ONCE = 200


def rebuilding(tokenizer: Tokenizer, pixels: Tensor, lengths: Sequence[int] = ()) -> dict[str, float]:
    """Of uint8 pixels (n, 3, S, S): "mse" in [0, 1], "psnr" in dB (mean over pictures), "usage" and "perplexity" of the
    codebook, and "psnr@k" from the first k tokens for each k of `lengths`.
    """
    codes = CodeStatistics()
    sums: dict[str, float] = {}
    for part in pixels.split(AT_ONCE):
        tokens = tokenizer.encode(part)
        codes.update(tokens)
        whole = tokenizer.decode(tokens)
        found = {"mse": float((whole - part.float() / 255).square().mean()), "psnr": float(psnr(whole, part).mean())}
        for length in lengths:
            found[f"psnr@{length}"] = float(psnr(tokenizer.decode(tokens.prefix(length)), part).mean())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * len(part) / len(pixels)
    book = codes.rows()[0]
    return sums | {"usage": book.usage or 0.0, "perplexity": book.perplexity or 0.0}


def class_probe(tokenizer: Tokenizer, context: Context, size: int, train: int, test: int) -> float:
    """Accuracy, in percent, of a linear map from all code vectors of a picture to its class."""

    def features(pixels: Tensor) -> Tensor:
        return torch.cat([tokenizer.embed(tokenizer.encode(part)).flatten(1).float() for part in pixels.split(AT_ONCE)])

    pixels, labels = context.train_pixels(size, train)
    test_pixels, test_labels = context.test_pixels(size, test)
    return probe(features(pixels), labels, features(test_pixels), test_labels)
