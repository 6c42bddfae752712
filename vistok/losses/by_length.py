"""Several discriminators of one kind, each for reconstructions from another number of tokens.

Source: KARL's code (arXiv:2507.07995), which has eight of them, 32 tokens apart.
"""

from typing import Any

from torch import Tensor, nn

from vistok.errors import ConfigError
from vistok.losses.discriminators import Discriminator, build_discriminator


class ByLength(Discriminator):
    """`count` discriminators named `of`, of which `choose` sets the one for a number of tokens: the first below
    2 `span`, each other for `span` more, the last for all that is more. `options` are those of each.
    """

    def __init__(self, of: str = "patchgan", count: int = 8, span: int = 32, **options: Any) -> None:
        super().__init__()
        if count < 1 or span < 1:
            raise ConfigError(f"discriminators by length need count and span of at least 1, got {count} and {span}")
        self.span, self.chosen = span, 0
        self.each = nn.ModuleList(build_discriminator(of, **options) for _ in range(count))
        self.sizes = self.each[0].sizes  # type: ignore[assignment]

    def choose(self, tokens: int) -> None:
        """Use the discriminator of that many tokens from now on."""
        self.chosen = max(0, min(len(self.each), tokens // self.span) - 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] to the logits of the chosen one."""
        return self.each[self.chosen](pixels)
