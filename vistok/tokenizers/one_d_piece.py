"""One-D-Piece: TiTok whose first tokens carry the most, so that any prefix of its 256 decodes.

"One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression" (arXiv:2501.10064)

What is new is one line of training, Tail Token Drop: the quantized sequence is cut at a random length before it is
decoded, so what matters most moves to the front. The network is TiTok's two-stage one, its decoder's sequence only
gets shorter:

    pixels (B, 3, 256, 256) -> codes (B, 256), 12 bits each -> the first l of them
      -> ViT over [class | 16 x 16 masks | l tokens] -> pixels

    tok = vistok.load("one-d-piece-l-256")
    small = tok.encode(images).prefix(32)      # 48 bytes an image
"""

from dataclasses import replace

import torch
from torch import Tensor

from vistok.registry import System
from vistok.tokenizers.titok import BASE, LARGE, SMALL, TiTok, TiTokConfig, configure, key_table, recognise
from vistok.tokenizers.titok import VARIANTS as TITOK


class OneDPiece(TiTok):
    """TiTok with ordered tokens: `decode` takes any prefix. Config and checkpoints are TiTok's."""

    system = "one-d-piece"
    prefix_rule = "any"

    def shorten(self, vectors: Tensor, rng: torch.Generator) -> Tensor:
        """Tail Token Drop (section 3.2): keep the first e tokens, e uniform in 1..N, one draw for the whole batch."""
        end = int(torch.randint(1, vectors.shape[1] + 1, (1,), generator=rng, device=rng.device))
        return vectors[:, :end]


VARIANTS = {
    "one-d-piece-l-256": TiTokConfig(LARGE, LARGE, tokens=256),
    "one-d-piece-b-256": TiTokConfig(BASE, BASE, tokens=256),
    "one-d-piece-s-256": TiTokConfig(SMALL, SMALL, tokens=256),
    "one-d-piece-tiny": replace(TITOK["titok-tiny"], tokens=12),
    "one-d-piece-tiny-proxy": replace(TITOK["titok-tiny-proxy"], tokens=12),
}


SYSTEM = System(
    "one-d-piece", OneDPiece, TiTokConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure
)
