"""HiMTok: a segmentation mask as at most 32 tokens, coarse to fine, which a language model can write.

"HiMTok: Learning Hierarchical Mask Tokens for Image Segmentation with Large Multimodal Model" (arXiv:2503.13026)

What is new: TiTok's network over masks, trained on random prefixes, so that the first tokens say roughly where, later
ones the outline. Masks are decoded from tokens alone, without the image.

    mask (B, 1, H, W) in [0, 1] -> padded to a square, scaled to 256 x 256, three equal channels
      -> ViT over [class | 16 x 16 patches | 32 queries, causal] -> latent (B, 32, 12)
      -> VQ of unit vectors, codebook behind a learned linear map -> codes (B, 32), 10 bits each
      -> the first k of them, zeros for the rest
      -> ViT over [class | 16 x 16 masks | 32 tokens] -> MLP (B, 1024, 16, 16) -> MaskGIT-VQGAN's CNN (B, 3, 256, 256)
      -> sigmoid(5 (mean of the channels - 0.5)) -> probability (B, 1, H, W)

    tok = vistok.load("himtok-l-32")
    tokens = tok.encode(masks)                              # codes (B, 32)
    rough = tok.decode(tokens.prefix(4), threshold=0.5)     # 5 bytes a mask

What a language model needs beside that (soft tokens, its losses, placeholder ids) is in `_himtok_language.py`, here as
methods of the tokenizer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.keys import Drop, KeyTable, Rename, Rule, State
from vistok.layout import Output, Segment, Sizes, TokenSpec
from vistok.losses.segmentation import binary_cross_entropy, dice, dilate, edge_weighted_square, erode
from vistok.nn.cnn import CNNConfig, CNNDecoder
from vistok.nn.patching import unpatchify
from vistok.nn.query_vit import INIT_STD, GridDecoder, QueryEncoder, ViTSize, causal_queries, initialise
from vistok.quantize import VectorQuantizer
from vistok.quantize.entropy import EntropyTerm
from vistok.registry import System
from vistok.tokenizer import TokenData, Tokenizer
from vistok.tokenizers import _titok_keys
from vistok.tokenizers.titok import LARGE
from vistok.tokenizers.vqgan import MASKGIT_F16

SHARPNESS = 5.0  # of the sigmoid that makes a probability of the CNN's output
KERNELS = (3, 5, 7)  # of the dilation and erosion in training


@dataclass(frozen=True)
class HiMTokConfig:
    """Sizes of one HiMTok.

    tokens, token_dim    N and D
    codebook_size        K; `commitment` weighs the latent's part of the quantizer's loss
    legacy               mixes the encoder's output the way the released model does, and decodes by `features` channels
                         and the CNN `pixel_decoder`; without it patches of pixels come out of the ViT directly
    features             channels between the ViT and the CNN
    distort              share of the masks that training dilates or erodes before they are encoded
    edge, dice, bce      weights of the loss: of edges within the squared error, of dice, of the cross-entropy
    diversity            weight of the entropy term that spreads the codes; the authors have one, at 0
    init_std             of the first weights, as in TiTok: 0.02 at widths of 512 and more, more in narrower models
    """

    encoder: ViTSize = LARGE
    decoder: ViTSize = LARGE
    tokens: int = 32
    token_dim: int = 12
    codebook_size: int = 1024
    commitment: float = 0.01
    legacy: bool = True
    features: int = 1024
    pixel_decoder: CNNConfig | None = field(default=replace(MASKGIT_F16.cnn, latent_dim=1024))
    image_size: int = 256
    encoder_patch: int = 16
    decoder_patch: int = 16
    distort: float = 0.0
    edge: float = 8.0
    dice: float = 0.5
    bce: float = 2.0
    diversity: float = 0.0
    init_std: float = INIT_STD
    version: int = 1

    def __post_init__(self) -> None:
        for patch in (self.encoder_patch, self.decoder_patch):
            if self.image_size % patch:
                raise ConfigError(f"patches of {patch} do not divide masks of {self.image_size}")
        if self.legacy != (self.pixel_decoder is not None):
            raise ConfigError("legacy models have a pixel_decoder, the others none (pixel_decoder=None)")
        if self.pixel_decoder is not None and self.pixel_decoder.latent_dim != self.features:
            raise ConfigError(f"features {self.features} differ from pixel_decoder.latent_dim")
        if not 0 <= self.distort <= 1:
            raise ConfigError(f"distort {self.distort} is a share, between 0 and 1")


class MaskEncoder(nn.Module):
    """Masks (B, 3, S, S) in [0, 1], channels alike, to the latent (B, N, D)."""

    def __init__(self, config: HiMTokConfig) -> None:
        super().__init__()
        side = config.image_size // config.encoder_patch
        self.trunk = QueryEncoder(
            (side, side), config.encoder_patch, config.tokens, config.encoder, causal=True, init_std=config.init_std
        )
        self.mixes = config.legacy
        self.project = nn.Linear(config.encoder.width, config.token_dim)
        initialise(self.project, config.init_std)

    def forward(self, pixels: Tensor) -> Tensor:
        queries = self.trunk(pixels)
        if self.mixes:  # a reshape where a transpose was meant, as in TiTok: it mixes what the causal mask kept apart
            batch, count, width = queries.shape
            queries = queries.reshape(batch, width, count).transpose(1, 2)
        return self.project(queries)


class MaskDecoder(nn.Module):
    """Vectors (B, n, D), n at most N, to the values (B, 3, S, S) of which `probability` is made."""

    def __init__(self, config: HiMTokConfig) -> None:
        super().__init__()
        self.patch = config.decoder_patch
        side, width = config.image_size // self.patch, config.decoder.width
        self.grid = (side, side)
        self.trunk = GridDecoder(
            self.grid, config.tokens, config.token_dim, config.decoder, padded=True, init_std=config.init_std
        )
        self.pixels: CNNDecoder | None = None
        if config.pixel_decoder is not None:
            self.features = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, config.features))
            self.pixels = CNNDecoder(config.pixel_decoder)
        else:
            self.features = nn.Linear(width, 3 * self.patch**2)  # type: ignore[assignment]
            self.smooth = nn.Conv2d(3, 3, 3, padding=1)
            initialise(self.smooth, config.init_std)
        initialise(self.features, config.init_std)

    def forward(self, vectors: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`lengths` (B,): how many vectors of each item count; the rest are zeros."""
        cells = self.features(self.trunk(vectors, lengths=lengths))
        if self.pixels is None:
            return self.smooth(unpatchify(cells, self.grid, self.patch, "ppc"))
        return self.pixels(cells.transpose(1, 2).unflatten(2, self.grid))


class HiMTok(Tokenizer):
    """See the module's docstring. `decode(tokens, threshold=0.5)` gives zeros and ones instead of probabilities."""

    system = "himtok"
    config: HiMTokConfig
    encoder: MaskEncoder
    quantizer: VectorQuantizer
    decoder: MaskDecoder

    def __init__(self, config: HiMTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = MaskEncoder(config)
        self.quantizer = VectorQuantizer(
            config.token_dim, config.codebook_size, metric="cosine", transform=True, commitment=config.commitment,
            entropy=EntropyTerm(weight=config.diversity) if config.diversity else None,
        )  # fmt: skip
        self.decoder = MaskDecoder(config)
        segment = Segment("sequence", (config.tokens,), (config.codebook_size,))
        self.spec = TokenSpec(
            size=(config.image_size, config.image_size),
            layout=lambda size: (segment,),
            sizes=Sizes(square=True),  # the model scales inside; what is not square is padded below or on the right
            prefix_rule="any",
            modality="mask",
            output=Output(modality="mask", channels=1),
        )

    def tokenize(self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], **conditions: Any) -> TokenData:
        """Codes (B, N) of square masks (B, 1, S, S) of any side."""
        return TokenData(codes=self.quantizer.encode(self.encoder(self.prepare(pixels))))

    def detokenize(  # type: ignore[override]
        self,
        data: TokenData,
        spec: TokenSpec,
        *,
        seeds: list[int],
        dtype: torch.dtype,
        threshold: float | None = None,
    ) -> Tensor:
        """Codes (B, n) to probabilities (B, 1, S, S), or to zeros and ones: those of at least `threshold`."""
        vectors = self.quantizer.decode(data.codes)  # type: ignore[arg-type]
        found = probability(self.decoder(vectors.to(self.dtype)))
        found = F.interpolate(found, size=spec.size, mode="nearest")
        if threshold is None:
            return found
        if not 0 < threshold < 1:
            raise InputError(f"threshold {threshold}; expected a probability between 0 and 1")
        return (found >= threshold).to(found.dtype)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Square masks (B, 1 or 3, H, H), uint8 or in [0, 1], as the encoder takes them: (B, 3, S, S)."""
        side = self.config.image_size
        mask = super().prepare(pixels[:, :1])
        return F.interpolate(mask, size=(side, side), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)

    def forward(self, pixels: Tensor, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Probabilities (B, 1, S, S) at the model's own size, of masks; from the first `lengths` (B,) tokens each."""
        quantized = self.quantizer(self.encoder(self.prepare(pixels)))
        return probability(self.decoder(quantized.vectors.to(self.dtype), lengths))

    # -- training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Iterator[dict[str, Any]], rng: torch.Generator) -> None:
        """A fresh codebook begins as latents of a first batch, drawn at random.

        The authors begin with TiTok's weights, whose latents differ between pictures. Those of a fresh encoder hardly
        do: among codes that lie anywhere, all of them would choose the same few.
        """
        latents = self.encoder(self.prepare(next(batches)["pixels"])).flatten(0, 1).float()
        size = self.config.codebook_size
        chosen = torch.randint(len(latents), (size,), generator=rng, device=rng.device).to(latents.device)
        assert self.quantizer.transform is not None
        self.quantizer.transform.weight.copy_(torch.eye(self.config.token_dim))
        self.quantizer.codebook.copy_(F.normalize(latents[chosen], dim=-1))

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Training terms for `batch["pixels"]` (B, 1 or 3, H, H): masks, of which the first channel counts.

        "reconstruction" (squared error of every output channel, edges weighted), "dice" and "bce" of the probability
        that decoding gives, each item decoded from a prefix whose length is uniform in 1..N; the quantizer's
        "commitment" and "codebook", and "entropy" with `diversity`.

        The authors' losses see the first channel alone, which serves where weights start from TiTok's; from scratch the
        others would never learn, and decoding takes the mean of all.
        """
        mask = self.prepare(batch["pixels"])
        seen = distorted(mask, self.config.distort, rng) if self.config.distort else mask
        quantized = self.quantizer(self.encoder(seen))
        values = self.decoder(quantized.vectors.to(self.dtype), self.lengths(len(mask), rng))
        target, found = mask[:, :1], probability(values)
        return {
            "reconstruction": edge_weighted_square(values, target, self.config.edge),
            "dice": self.config.dice * dice(found, target),
            "bce": self.config.bce * binary_cross_entropy(found, target),
            **quantized.losses,
        }

    def lengths(self, count: int, rng: torch.Generator) -> Tensor:
        """How many tokens (count,) each mask of a batch is decoded from in training: uniform in 1..N."""
        return torch.randint(1, self.config.tokens + 1, (count,), generator=rng, device=rng.device)

    # -- beside a language model ---------------------------------------------------------------------------------

    def soft_decode(self, probabilities: Tensor) -> Tensor:
        """Probabilities over codes (B, n, K), such as a language model's, to mask probabilities (B, S, S).

        Differentiable. The expected vector is of the codebook as it is, not scaled to unit length: so the authors do.
        """
        vectors = probabilities.to(self.dtype) @ self.quantizer.rows().to(self.dtype)
        return probability(self.decoder(vectors))[:, 0]


def probability(values: Tensor) -> Tensor:
    """What the decoder gives, (B, C, S, S), to the probability of the mask, (B, 1, S, S)."""
    return torch.sigmoid(SHARPNESS * (values.mean(1, keepdim=True) - 0.5))


def distorted(mask: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Each mask of (B, C, S, S), with the probability `share`, dilated or eroded by a kernel of 3, 5 or 7 pixels."""
    draws = torch.rand(3, len(mask), generator=rng, device=rng.device)
    out = mask.clone()
    chosen = (draws[1] * len(KERNELS)).long()
    for index, kernel in enumerate(KERNELS):
        for change, side in ((dilate, draws[2] < 0.5), (erode, draws[2] >= 0.5)):
            rows = ((draws[0] < share) & (chosen == index) & side).nonzero().flatten()
            out[rows] = change(mask[rows], kernel).to(mask.dtype)
    return out


# -- variants --------------------------------------------------------------------------------------------------------

NARROW_STD = INIT_STD * (512 / 64) ** 0.5  # a layer of width 64 then passes on as much as one of 512
_TINY_CNN = CNNConfig(32, (1, 1, 2), 1, 16, style="maskgit")
_TINY = HiMTokConfig(
    ViTSize(32, 2, 2), ViTSize(32, 2, 2), tokens=8, token_dim=6, codebook_size=64, features=16, pixel_decoder=_TINY_CNN,
    image_size=32, encoder_patch=4, decoder_patch=4,
)  # fmt: skip

VARIANTS = {
    "himtok-l-32": HiMTokConfig(),
    "himtok-tiny": _TINY,
    "himtok-tiny-direct": replace(_TINY, legacy=False, pixel_decoder=None),
    "himtok-silhouettes": HiMTokConfig(
        ViTSize(64, 3, 4), ViTSize(64, 3, 4), tokens=16, token_dim=8, codebook_size=256, legacy=False,
        pixel_decoder=None, image_size=64, encoder_patch=8, decoder_patch=8, init_std=NARROW_STD,
        commitment=0.25, diversity=0.1,
    ),
}  # fmt: skip


# -- published checkpoints -------------------------------------------------------------------------------------------


def key_table(config: HiMTokConfig) -> KeyTable:
    """The authors' keys to ours: TiTok's, the codebook's linear map, and the names of the decoder's last layers."""
    levels = len(config.pixel_decoder.multipliers) if config.pixel_decoder else 0
    cells = (config.image_size // config.encoder_patch) ** 2 + 1
    blocked = {"encoder.attn_mask": ~causal_queries(cells + config.tokens, cells)}
    rules: list[Rule] = [
        Rename("quantize.embedding_proj.weight", "quantizer.transform.weight"),
        Drop("encoder.attn_mask", restore=lambda ours: blocked),
        Drop("sam.*"),
    ]
    theirs, ours = ("decoder.ffn.#", "decoder.features.#") if config.legacy else ("decoder.ffn.0", "decoder.features")
    rules += [
        Rename(f"{theirs}.weight", f"{ours}.weight", lambda kernel: kernel.flatten(1), lambda m: m[:, :, None, None]),
        Rename(f"{theirs}.bias", f"{ours}.bias"),
    ]
    return KeyTable(*rules, *_titok_keys.key_table(config.legacy, False, levels).rules)


def recognise(state: State) -> HiMTokConfig | None:
    """The config that an authors' state dict fits; None where it is no HiMTok. Raises ConfigError for unknown sizes."""
    if "quantize.embedding_proj.weight" not in state or "encoder.attn_mask" not in state:
        return None
    fields = fields_of_state(state)
    sizes = set(_titok_keys.SIZES.values()) | {ViTSize(1024, 32, 16)}
    if not {fields["encoder"], fields["decoder"]} <= sizes:
        raise ConfigError(
            f"a HiMTok of width {fields['encoder'].width}, no named size: heads do not show, pass its config"
        )
    return HiMTokConfig(**fields)


def fields_of_state(state: State) -> dict[str, Any]:
    """Fields of the config that shapes tell; heads are taken to be 64 wide."""
    legacy = "pixel_decoder.conv_in.weight" in state

    def vit(side: str) -> ViTSize:
        width = state[f"{side}.class_embedding"].shape[1]
        layers = _count(state, f"{side}.transformer.", ".ln_1.weight")
        return ViTSize(width, layers, max(1, width // _titok_keys.HEAD))

    patch = state["encoder.patch_embed.weight"].shape[2]
    side = patch * round((len(state["encoder.positional_embedding"]) - 1) ** 0.5)
    cells = round((len(state["decoder.positional_embedding"]) - 1) ** 0.5)
    fields: dict[str, Any] = {
        "encoder": vit("encoder"),
        "decoder": vit("decoder"),
        "tokens": len(state["latent_tokens"]),
        "token_dim": state["quantize.embedding.weight"].shape[1],
        "codebook_size": len(state["quantize.embedding.weight"]),
        "legacy": legacy,
        "image_size": side,
        "encoder_patch": patch,
        "decoder_patch": side // cells,
        "pixel_decoder": None,
    }
    if legacy:
        width = state["pixel_decoder.conv_out.weight"].shape[1]
        levels = _count(state, "pixel_decoder.up.", ".block.0.conv1.weight")
        fields["features"] = state["pixel_decoder.conv_in.weight"].shape[1]
        fields["pixel_decoder"] = CNNConfig(
            width,
            tuple(state[f"pixel_decoder.up.{level}.block.0.conv1.weight"].shape[0] // width for level in range(levels)),
            _count(state, "pixel_decoder.up.0.block.", ".conv1.weight"),
            fields["features"],
            style="maskgit",
        )
    return fields


def _count(state: State, before: str, after: str) -> int:
    return next(index for index in range(len(state) + 1) if f"{before}{index}{after}" not in state)


def configure(plain: Mapping[str, Any]) -> HiMTokConfig:
    """The config that an authors' YAML describes (`model.vq_model`, `dataset.preprocessing`). Raises ConfigError."""
    try:
        model = plain["model"]["vq_model"]
        side = plain.get("dataset", {}).get("preprocessing", {}).get("crop_size", 256)
        legacy = bool(model.get("is_legacy", True))
        sizes = {**_titok_keys.SIZES, "xlarge": ViTSize(1024, 32, 16)}
        return HiMTokConfig(
            encoder=sizes[model["vit_enc_model_size"]],
            decoder=sizes[model["vit_dec_model_size"]],
            tokens=model["num_latent_tokens"],
            token_dim=model["token_size"],
            codebook_size=model["codebook_size"],
            commitment=model.get("commitment_cost", 0.25),
            legacy=legacy,
            pixel_decoder=HiMTokConfig.pixel_decoder if legacy else None,
            image_size=side,
            encoder_patch=model["vit_enc_patch_size"],
            decoder_patch=model["vit_dec_patch_size"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"this is not a config of HiMTok's authors: {error} is missing or unknown") from error


SYSTEM = System("himtok", HiMTok, HiMTokConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
