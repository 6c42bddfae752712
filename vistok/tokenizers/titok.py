"""TiTok: a picture as 32 to 256 tokens without a grid, and TA-TiTok, which reads a caption while decoding.

"An Image is Worth 32 Tokens for Reconstruction and Generation" (arXiv:2406.07550)
"Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional Tokens" (arXiv:2501.07730)

What is new: N learned queries beside the patches of a plain ViT become the tokens; a second ViT, shown the tokens and a
grid of mask tokens, fills in the grid.

    pixels (B, 3, 256, 256) in [0, 1]
      -> ViT over [class | 16 x 16 patches | N queries] -> latent (B, N, D)
      -> VQ codes (B, N), or a Gaussian's mean (B, N, D)
      -> ViT over [class | 16 x 16 masks | N tokens | caption features (B, 77, 768)]
           one stage   -> 16 x 16 patches of pixels -> 3x3 convolution                                       -> pixels
           two stages  -> 1024 logits a cell, the codes of MaskGIT-VQGAN -> expected code vector -> its CNN  -> pixels

Three families are published, and one config holds them all:

    two stages ("legacy")   first trained to predict the codes of a frozen MaskGIT-VQGAN (`pixel_decoder=None`), then
                            its CNN is appended and the decoding side is trained on pixels, the encoding side frozen
    one stage               pixels directly, VQ or KL
    text-aware (TA-TiTok)   one stage, with CLIP's features of a caption in the decoder's sequence
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import ConfigError, InputError
from vistok.keys import KeyTable, State
from vistok.layout import Needs, Output, Segment, Sizes, TokenSpec
from vistok.model import Aside
from vistok.nn.clip_text import clip_text_features
from vistok.nn.cnn import CNNConfig, CNNDecoder
from vistok.nn.patching import unpatchify
from vistok.nn.query_vit import INIT_STD, GridDecoder, QueryEncoder, ViTSize, initialise
from vistok.quantize import EntropyTerm, GaussianQuantizer, Quantized, VectorQuantizer
from vistok.registry import System
from vistok.tokenizer import TokenData
from vistok.tokenizers import _titok_keys
from vistok.tokenizers._judged import JudgedTokenizer
from vistok.tokenizers.vqgan import MASKGIT_F16, VQGAN
from vistok.tokens import Tokens

SMALL, BASE, LARGE = _titok_keys.SIZES["small"], _titok_keys.SIZES["base"], _titok_keys.SIZES["large"]


@dataclass(frozen=True)
class TiTokConfig:
    """Sizes and kind of one TiTok.

    tokens, token_dim   N and D
    latent              "vq", or "kl" for continuous tokens
    codebook_size       K; `normalize` compares and gives codes of unit length; `clustering` moves rarely used codes in
                        training (CVQ); `commitment` weighs the latent's part of the quantizer's loss, published: 0.25;
                        `entropy` the term that spreads latents over the codes, which nobody published: small models
                        need it to wake up
    kl_weight           of the KL divergence in the loss
    legacy              predicts proxy codes instead of pixels, and mixes the encoder's output the way the published
                        two-stage models do
    proxy_codes         size of the codebook that a legacy decoder predicts
    pixel_decoder       the CNN of a legacy model's second stage; None in its first stage
    text                (positions, width) of the caption's features, None without a caption
    init_std            of the first weights, as published 0.02 at widths of 512 and more. Narrower models pass on as
                        much of the picture with 0.02 sqrt(512 / width), and may collapse with less
    """

    encoder: ViTSize = LARGE
    decoder: ViTSize = LARGE
    tokens: int = 32
    token_dim: int = 12
    latent: Literal["vq", "kl"] = "vq"
    codebook_size: int = 4096
    normalize: bool = True
    clustering: bool = False
    commitment: float = 0.25
    entropy: float = 0.0
    kl_weight: float = 1e-6
    legacy: bool = True
    proxy_codes: int = 1024
    pixel_decoder: CNNConfig | None = field(default=MASKGIT_F16.cnn)
    text: tuple[int, int] | None = None
    image_size: int = 256
    encoder_patch: int = 16
    decoder_patch: int = 16
    init_std: float = INIT_STD
    version: int = 1

    def __post_init__(self) -> None:
        for patch in (self.encoder_patch, self.decoder_patch):
            if self.image_size % patch:
                raise ConfigError(f"patches of {patch} do not divide pictures of {self.image_size}")
        if self.pixel_decoder is not None and not (self.legacy and self.latent == "vq"):
            raise ConfigError("a pixel_decoder belongs to legacy models with VQ: set pixel_decoder=None")

    def grid(self, patch: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size // patch, self.image_size // patch


class TiTokEncoder(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] to the latent (B, N, D), or (B, N, 2 D) where it is a Gaussian's moments."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        patch = config.encoder_patch
        self.trunk = QueryEncoder(config.grid(patch), patch, config.tokens, config.encoder, init_std=config.init_std)
        self.mixes = config.legacy
        self.project = nn.Linear(config.encoder.width, config.token_dim * (2 if config.latent == "kl" else 1))
        initialise(self.project, config.init_std)

    def forward(self, pixels: Tensor) -> Tensor:
        queries = self.trunk(pixels)
        if self.mixes:
            # The two-stage models were trained with a reshape where a transpose was meant: the numbers of (N, W) are
            # read as (W, N). Their weights expect it.
            batch, count, width = queries.shape
            queries = queries.reshape(batch, width, count).transpose(1, 2)
        return self.project(queries)


class PixelHead(nn.Module):
    """The decoder of one-stage models: vectors (B, n, D) to pixels (B, 3, S, S), not clamped."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.grid, self.patch = config.grid(config.decoder_patch), config.decoder_patch
        self.trunk = _grid_decoder(config)
        self.project = nn.Linear(config.decoder.width, 3 * self.patch**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        initialise(self.project, config.init_std)
        initialise(self.smooth, config.init_std)

    def forward(self, vectors: Tensor, text: Tensor | None = None) -> Tensor:
        cells = self.trunk(vectors, text)
        return self.smooth(unpatchify(self.project(cells), self.grid, self.patch, "ppc"))


class ProxyDecoder(nn.Module):
    """The decoder of two-stage models: vectors (B, n, D) to logits over proxy codes, and on to pixels in stage two.

    `pixels` is None in stage one: the logits are all there is, and MaskGIT-VQGAN decodes their argmax.
    """

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.grid = config.grid(config.decoder_patch)
        width = config.decoder.width
        self.trunk = _grid_decoder(config)
        self.classify = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, config.proxy_codes))
        initialise(self.classify, config.init_std)
        self.codebook: nn.Parameter | None = None
        self.pixels: CNNDecoder | None = None
        if config.pixel_decoder is not None:
            bound = 1 / config.proxy_codes
            rows = torch.empty(config.proxy_codes, config.pixel_decoder.latent_dim).uniform_(-bound, bound)
            self.codebook = nn.Parameter(rows)
            self.pixels = CNNDecoder(config.pixel_decoder)

    def logits(self, vectors: Tensor, text: Tensor | None = None) -> Tensor:
        """Vectors (B, n, D) to logits (B, cells, proxy codes), row-major over the grid."""
        return self.classify(self.trunk(vectors, text))

    def forward(self, vectors: Tensor, text: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, S, S), not clamped. Raises InputError in stage one, which has none."""
        if self.codebook is None or self.pixels is None:
            raise InputError(
                "a first-stage TiTok predicts codes of MaskGIT-VQGAN, not pixels: decode "
                "decoder.logits(vectors).argmax(-1) with that model, or train the second stage (pixel_decoder=...)"
            )
        expected = self.logits(vectors, text).softmax(-1) @ self.codebook
        return self.pixels(expected.transpose(1, 2).unflatten(2, self.grid))


class TiTok(JudgedTokenizer):
    """See the module's docstring. `encode(images, sample=True, seed=...)` draws from a KL model's Gaussian, whose mean
    is the default; `decode(tokens, text=...)` of a text-aware model takes captions, or CLIP's features (B, 77, 768).
    """

    system = "titok"
    prefix_rule: Literal["any", "none"] = "none"
    config: TiTokConfig
    quantizer: VectorQuantizer | GaussianQuantizer
    decoder: PixelHead | ProxyDecoder
    _teacher: Aside = Aside()

    def __init__(self, config: TiTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder = TiTokEncoder(config)
        if config.latent == "kl":
            self.quantizer = GaussianQuantizer(config.token_dim, weight=config.kl_weight)
        else:
            self.quantizer = VectorQuantizer(
                config.token_dim,
                config.codebook_size,
                metric="cosine" if config.normalize else "l2",
                learning="cvq" if config.clustering else "gradient",
                commitment=config.commitment,
                entropy=EntropyTerm(config.entropy) if config.entropy else None,
            )
        self.decoder = ProxyDecoder(config) if config.legacy else PixelHead(config)
        side, cnn = config.image_size, config.pixel_decoder
        segment = (
            Segment("sequence", (config.tokens,), dim=config.token_dim)
            if config.latent == "kl"
            else Segment("sequence", (config.tokens,), (config.codebook_size,))
        )
        self.spec = TokenSpec(
            size=(side, side),
            layout=lambda size: (segment,),
            sizes=Sizes(only=((side, side),)),
            prefix_rule=self.prefix_rule,
            needs=Needs(decode=("text",) if config.text else ()),
            output=Output(scale=cnn.factor / config.decoder_patch if cnn else 1.0),
        )

    @property
    def stage(self) -> Literal["proxy", "pixels", "single"]:
        """What `loss` trains: "proxy" codes, then "pixels" in legacy models; others have a single stage."""
        if not self.config.legacy:
            return "single"
        return "proxy" if self.config.pixel_decoder is None else "pixels"

    def tokenize(  # type: ignore[override]
        self, pixels: Tensor, spec: TokenSpec, *, seeds: list[int], sample: bool = False
    ) -> TokenData:
        """Codes (B, N); of a KL model the mean (B, N, D), or with `sample` a draw, from each item's own seed."""
        latent = self.encoder(self.prepare(pixels))
        if isinstance(self.quantizer, VectorQuantizer):
            return TokenData(codes=self.quantizer.encode(latent))
        return TokenData(vectors=self.quantizer.encode(latent, seed=seeds if sample else None).to(self.dtype))

    def detokenize(  # type: ignore[override]
        self, data: TokenData, spec: TokenSpec, *, seeds: list[int], dtype: torch.dtype, text: Any = None
    ) -> Tensor:
        """Codes or vectors, of the captions `text` where the model reads them, to pixels in [0, 1].

        In the first stage a teacher, where there is one, decodes the likeliest proxy codes.
        """
        vectors = self.quantizer.decode(data.codes) if data.vectors is None else data.vectors  # type: ignore[arg-type]
        if self.stage == "proxy" and self._teacher.held is not None:
            assert isinstance(self.decoder, ProxyDecoder)
            codes = self.decoder.logits(vectors.to(self.dtype), self.text_features(text, len(vectors))).argmax(-1)
            teacher = self._teacher.held
            return teacher.decode(Tokens(teacher.spec.at(self.spec.size).segments, codes=codes)).to(self.dtype)
        return self.decoder(vectors.to(self.dtype), self.text_features(text, len(vectors))).clamp(0, 1)

    def forward(  # type: ignore[override]
        self, pixels: Tensor, text: Any = None, seed: int | Sequence[int] | None = None
    ) -> Tensor:
        """Reconstruction (B, 3, S, S), not clamped, of pixels in [0, 1]; `seed` samples a KL model's latent."""
        return self.reconstruct(self.quantize(pixels, seed).vectors, text)

    def quantize(self, pixels: Tensor, seed: int | Sequence[int] | None = None) -> Quantized:
        """Vectors (B, N, D), codes and losses of pixels in [0, 1]."""
        latent = self.encoder(self.prepare(pixels))
        if isinstance(self.quantizer, GaussianQuantizer):
            return self.quantizer(latent, seed=seed)
        return self.quantizer(latent)

    def reconstruct(self, vectors: Tensor, text: Any = None) -> Tensor:
        """Pixels (B, 3, S, S), not clamped, of vectors (B, n, D); differentiable."""
        return self.decoder(vectors.to(self.dtype), self.text_features(text, len(vectors)))

    def text_features(self, text: Any, items: int) -> Tensor | None:
        """What the decoder reads of `text`: a caption for all, one for each item, or features (B or 1, 77, 768).

        None for a model without text. Raises InputError where model and text do not fit.
        """
        wanted = self.config.text
        if wanted is None:
            if text is not None:
                raise InputError(f"{self.name} does not read text; the text-aware models are ta-titok-*")
            return None
        if text is None:
            raise InputError(f"{self.name} decodes with a caption: pass text=..., an empty string where there is none")
        if not isinstance(text, Tensor):
            text = clip_text_features([text] if isinstance(text, str) else list(text), device=self.device)
        if text.ndim != 3 or text.shape[1:] != wanted or text.shape[0] not in (1, items):
            raise InputError(
                f"text features of shape {tuple(text.shape)}; expected ({items}, {wanted[0]}, {wanted[1]})"
            )
        return text.to(self.device, self.dtype).expand(items, -1, -1)

    # -- training ------------------------------------------------------------------------------------------------

    def learn_from(self, teachers: dict[str, Any], fresh: bool) -> None:
        """Take `teachers["codes"]`, the VQGAN whose codes the first stage predicts and whose CNN ends the second.

        The first stage then needs no `batch["proxy_codes"]`; a `fresh` second stage starts from the teacher's codebook
        and decoder. The teacher does not become part of the model. Raises ConfigError for one that does not fit.
        """
        teacher = teachers.get("codes")
        if set(teachers) != {"codes"} or not isinstance(teacher, VQGAN) or self.stage == "single":
            raise ConfigError(f"{self.name} learns from one teacher, 'codes', a VQGAN; in the two stages alone")
        side, cells = self.config.image_size, prod(self.decoder.grid)
        known = teacher.config.codebook_size, teacher.spec.at((side, side)).length
        if known != (self.config.proxy_codes, cells):
            raise ConfigError(
                f"{teacher.name} gives {known[1]} codes of {known[0]} a picture of {side} pixels, {self.name} predicts "
                f"{cells} of {self.config.proxy_codes}"
            )
        self._teacher = Aside(teacher)
        if self.stage == "pixels" and fresh:
            assert isinstance(self.decoder, ProxyDecoder)
            assert self.decoder.pixels is not None
            try:
                self.decoder.pixels.load_state_dict(teacher.decoder.cnn.state_dict())
            except RuntimeError as error:
                raise ConfigError(f"{teacher.name}'s decoder is not {self.name}'s pixel_decoder: {error}") from error
            table: Any = teacher.quantizer.table  # type: ignore[union-attr]
            with torch.no_grad():
                self.decoder.codebook.copy_(table())  # type: ignore[union-attr]

    def train(self, mode: bool = True) -> "TiTok":
        """In the second stage encoder and codebook are frozen, and stay in evaluation mode."""
        super().train(mode)
        if self.stage == "pixels":
            self.encoder.eval()
            self.quantizer.eval()
        return self

    def loss(self, batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Training terms (sections 3.3 and 4 of the paper).

        proxy stage    "proxy": cross-entropy with the codes that the teacher gives `batch["pixels"]`, or with
                       `batch["proxy_codes"]` (B, cells); the quantizer's "commitment" and "codebook"
        pixel stage    "reconstruction": mean squared error; with judges "perceptual" and "adversarial"; the encoding
                       side gets no gradient
        single stage   the same, and the quantizer's terms or "kl"

        `batch["text"]` for text-aware models, as `decode` takes it. Noise is drawn from `rng`. The reconstruction goes
        into `batch["reconstruction"]`, for the discriminator's turn.
        """
        pixels = self.prepare(batch["pixels"])
        seed = None
        if self.config.latent == "kl":
            seed = torch.randint(2**62, (len(pixels),), generator=rng, device=rng.device).tolist()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "pixels"):
            quantized = self.quantize(pixels, seed)
        vectors, text = self.shorten(quantized.vectors, rng), batch.get("text")
        if self.stage == "proxy":
            assert isinstance(self.decoder, ProxyDecoder)
            targets = self._proxy_codes(batch, pixels)
            logits = self.decoder.logits(vectors.to(self.dtype), self.text_features(text, len(pixels)))
            return {"proxy": F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), **quantized.losses}
        image = self.reconstruct(vectors, text)
        batch["reconstruction"] = image.detach()
        terms = {"reconstruction": F.mse_loss(image.float(), pixels.float())}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(image, pixels).mean()
        terms |= self.adversarial_terms(image, terms, self.last_layer, step)
        return terms if self.stage == "pixels" else terms | quantized.losses

    @property
    def last_layer(self) -> Tensor:
        """The weight that the adversarial term is weighed at."""
        if isinstance(self.decoder, PixelHead):
            return self.decoder.smooth.weight
        assert self.decoder.pixels is not None
        return self.decoder.pixels.last_layer

    def _proxy_codes(self, batch: dict[str, Any], pixels: Tensor) -> Tensor:
        if batch.get("proxy_codes") is not None:
            return batch["proxy_codes"].to(self.device)
        if self._teacher.held is None:
            raise InputError(
                "the first stage learns the codes of MaskGIT-VQGAN (B, cells): give batch['proxy_codes'], or the model "
                "that makes them to learn_from"
            )
        return self._teacher.held.encode(pixels.float().clamp(0, 1)).codes.to(self.device)

    def shorten(self, vectors: Tensor, rng: torch.Generator) -> Tensor:
        """The vectors that training decodes: here all of them."""
        return vectors


def _grid_decoder(config: TiTokConfig) -> GridDecoder:
    grid = config.grid(config.decoder_patch)
    size, std = config.decoder, config.init_std
    return GridDecoder(grid, config.tokens, config.token_dim, size, config.text, init_std=std)


# -- variants --------------------------------------------------------------------------------------------------------

_ONE_STAGE = TiTokConfig(
    BASE, LARGE, legacy=False, pixel_decoder=None, normalize=False, codebook_size=8192, token_dim=64
)
_KL = replace(_ONE_STAGE, latent="kl", token_dim=16)
_TINY_VIT = ViTSize(32, 2, 2)
_TINY = TiTokConfig(
    _TINY_VIT, _TINY_VIT, tokens=8, token_dim=6, codebook_size=64, proxy_codes=32, image_size=32, encoder_patch=8,
    decoder_patch=8, pixel_decoder=CNNConfig(32, (1, 1, 2, 2), 1, 16, style="maskgit"),
)  # fmt: skip
_TINY_ONE_STAGE = replace(_TINY, legacy=False, pixel_decoder=None, normalize=False)

VARIANTS = {
    "titok-l-32": TiTokConfig(LARGE, LARGE, tokens=32),
    "titok-b-64": TiTokConfig(BASE, BASE, tokens=64),
    "titok-s-128": TiTokConfig(SMALL, SMALL, tokens=128),
    "titok-bl-64-vq8k": replace(_ONE_STAGE, tokens=64),
    "titok-bl-128-vq8k": replace(_ONE_STAGE, tokens=128),
    "titok-sl-256-vq8k": replace(_ONE_STAGE, encoder=SMALL, tokens=256),
    "titok-ll-32-vae": replace(_KL, encoder=LARGE, tokens=32),
    "titok-bl-64-vae": replace(_KL, tokens=64),
    "titok-bl-128-vae": replace(_KL, tokens=128),
    "ta-titok-bl-32-vq": replace(_ONE_STAGE, tokens=32, text=(77, 768)),
    "ta-titok-bl-64-vq": replace(_ONE_STAGE, tokens=64, text=(77, 768)),
    "ta-titok-bl-128-vq": replace(_ONE_STAGE, tokens=128, text=(77, 768)),
    "ta-titok-bl-32-vae": replace(_KL, tokens=32, text=(77, 768)),
    "ta-titok-bl-64-vae": replace(_KL, tokens=64, text=(77, 768)),
    "ta-titok-sl-128-vae": replace(_KL, encoder=SMALL, tokens=128, text=(77, 768)),
    "titok-tiny": _TINY,
    "titok-tiny-proxy": replace(_TINY, pixel_decoder=None),
    "titok-tiny-vq": replace(_TINY_ONE_STAGE, clustering=True),
    "titok-tiny-vae": replace(_TINY_ONE_STAGE, latent="kl"),
    "titok-tiny-ta": replace(_TINY_ONE_STAGE, text=(5, 12)),
}


# -- published checkpoints -------------------------------------------------------------------------------------------


def key_table(config: TiTokConfig) -> KeyTable:
    """The authors' keys to ours, for a model of this config."""
    levels = len(config.pixel_decoder.multipliers) if config.pixel_decoder else 0
    return _titok_keys.key_table(config.legacy, config.clustering, levels)


def recognise(state: State) -> TiTokConfig | None:
    """The config that an authors' state dict fits, from its shapes; None where it is no TiTok.

    Raises ConfigError for sizes that are not the authors' named ones: the number of heads cannot be seen.
    """
    fields = _titok_keys.fields_of_state(state)
    if fields is None:
        return None
    if not {fields["encoder"], fields["decoder"]} <= {SMALL, BASE, LARGE}:
        widths = f"{fields['encoder'].width} and {fields['decoder'].width}"
        raise ConfigError(f"a TiTok of widths {widths}, no published size: heads do not show, pass its config")
    return TiTokConfig(**fields)


def configure(plain: Mapping[str, Any]) -> TiTokConfig:
    """The config that an authors' config file describes, as read from YAML or JSON. Raises ConfigError."""
    return TiTokConfig(**_titok_keys.fields_of_config(plain))


SYSTEM = System("titok", TiTok, TiTokConfig, VARIANTS, keys=key_table, recognise=recognise, configure=configure)
