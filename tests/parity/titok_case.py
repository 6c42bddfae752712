"""A case of TiTok's family as a model of ours, and the checks that its tokenizers share."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.cases import Case, assert_close
from vistok.keys import State
from vistok.tokenizers._titok_keys import fields_of_state
from vistok.tokenizers.titok import ProxyDecoder, TiTok, TiTokConfig, ViTSize, configure, key_table


def config_of(case: Case) -> TiTokConfig:
    """Options from the authors' config; sizes, which the fixtures change, from the weights; heads from config.json."""
    plain = case.config
    named = configure(plain)
    fields = fields_of_state(case.weights)
    assert fields is not None, "the weights are not recognised as TiTok's"
    seen = TiTokConfig(**fields)
    assert (seen.latent, seen.legacy, seen.clustering, seen.tokens) == (
        named.latent,
        named.legacy,
        named.clustering,
        named.tokens,
    )
    assert (seen.pixel_decoder is None) == (named.pixel_decoder is None)

    def with_heads(size: ViTSize, side: str) -> ViTSize:
        return replace(size, heads=plain.get(f"{side}_heads", plain.get("heads", size.heads)))

    return replace(
        seen,
        encoder=with_heads(seen.encoder, "encoder"),
        decoder=with_heads(seen.decoder, "decoder"),
        normalize=named.normalize,
        commitment=named.commitment,
    )


def load(case: Case, cls: type[TiTok] = TiTok) -> TiTok:
    """The model with the case's weights: every key used, none missing."""
    config = config_of(case)
    model = cls(config)
    model.load_state_dict(key_table(config).to_ours(case.weights))
    return model.eval()


def as_map(sequence: Tensor) -> Tensor:
    """(B, N, D) as the authors keep it, (B, D, 1, N)."""
    return sequence.transpose(1, 2)[:, :, None]


def as_sequence(latent_map: Tensor) -> Tensor:
    """(B, D, 1, N) as we keep it, (B, N, D)."""
    return latent_map[:, :, 0].transpose(1, 2)


def check_encoding(model: TiTok, io: State) -> None:
    """Encoder, and what its latent becomes: codes and losses, or a Gaussian with its sample and divergence."""
    pixels = io["image"]
    assert_close(as_map(model.encoder(pixels)), io["encoder_latent"], name="encoder_latent")
    latent = as_sequence(io["encoder_latent"])
    out = model.quantizer(latent)
    if "codes" in io:
        assert_close(model.encode(pixels).codes[:, None], io["codes"], name="codes")
        assert_close(out.codes[:, None], io["codes"], name="codes of the authors' latent")
        assert_close(as_map(out.vectors), io["quantized"], name="quantized")
        assert_close(as_map(model.quantizer.decode(out.codes)), io["quantized"], name="vectors of the codes")
        assert_close(out.losses["commitment"], io["commitment_loss"], name="commitment_loss")
        assert_close(out.losses["codebook"], io["codebook_loss"], name="codebook_loss")
        assert_close(sum(out.losses.values()), io["quantizer_loss"], name="quantizer_loss")
    if "mean" in io:
        mean, log_variance = model.quantizer.moments(latent)
        assert_close(as_map(mean), io["mean"], name="mean")
        assert_close(as_map(log_variance), io["logvar"], name="logvar")
        assert_close(model.encode(pixels).vectors, as_sequence(io["mean"]), name="vectors are the mean")
        positions = [[model.quantizer(one[None, None]).stats["kl"] for one in item] for item in latent]
        assert_close(torch.tensor(positions), io["kl"], name="kl")
        total = model.quantizer(latent).stats["kl"]
        assert_close(total, io["kl"].sum() / len(latent), name="kl of a batch")
        drawn = mean + torch.exp(0.5 * log_variance) * as_sequence(io["noise"])
        assert_close(as_map(drawn), io["sample"], name="sample")


def check_decoding(model: TiTok, io: State, text: Tensor | None = None) -> None:
    """Logits and pixels from the authors' own vectors, and from codes through `decode`."""
    if "quantized" in io:
        vectors = as_sequence(io["quantized"])
        if "decoder_logits" in io:
            check_logits(model, vectors, io["decoder_logits"], text=text)
        if "reconstruction" in io:
            assert_close(model.reconstruct(vectors, text), io["reconstruction"], name="reconstruction")
            conditions = {} if text is None else {"text": text}
            decoded = model.decode(model.encode(io["image"]), **conditions)
            assert_close(decoded, io["reconstruction"].clamp(0, 1), name="decode(encode)", scale=1)
    for name, source in (("reconstruction_from_sample", "sample"), ("reconstruction_from_mode", "mean")):
        if name in io:
            assert_close(model.reconstruct(as_sequence(io[source]), text), io[name], name=name)


def check_logits(
    model: TiTok, vectors: Tensor, expected: Tensor, name: str = "decoder_logits", text: Tensor | None = None
) -> None:
    assert isinstance(model.decoder, ProxyDecoder)
    logits = model.decoder.logits(vectors, text).transpose(1, 2).unflatten(2, model.decoder.grid)
    assert_close(logits, expected, name=name)


def check_proxy_loss(model: TiTok, io: State) -> None:
    """The first stage's loss, by the model's own `loss` where nothing random shortens the sequence."""
    assert isinstance(model.decoder, ProxyDecoder)
    logits = model.decoder.logits(as_sequence(io["quantized"]), io.get("text_guidance"))
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), io["proxy_codes"].flatten())
    assert_close(cross_entropy, io["stage1_reconstruction_loss"], name="stage1_reconstruction_loss")
    first = type(model)(replace(model.config, pixel_decoder=None))
    first.load_state_dict({key: value for key, value in model.state_dict().items() if key in first.state_dict()})
    if model.prefix_rule == "none":
        batch = {"pixels": io["image"], "proxy_codes": io["proxy_codes"], "text": io.get("text_guidance")}
        terms = first.eval().loss(batch, 0, torch.Generator().manual_seed(0))
        assert_close(terms["proxy"], io["stage1_reconstruction_loss"], name="proxy")
        assert_close(sum(terms.values()), io["stage1_total_loss"], name="stage1_total_loss")
