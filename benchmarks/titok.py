"""TiTok-L-32, encode and decode of a batch of 8, against a plain implementation in the authors' style, side by side.

    python benchmarks/titok.py [--batch 8] [--rounds 3] [--threads 2] [--out benchmarks/results/titok.json]

Random weights, the same in all: `plain` takes ours through the authors' key names. It is written as research code is:
sequence-first attention of `torch.nn`, every position through every layer, convolutions in PyTorch's default layout, a
doubled map before each upsampling convolution, and the whole table of distances to the codebook. See race.py for how
they run and what is reported.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from race import Racer, race, table
from torch import Tensor, nn

import vistok
from vistok.tokenizer import TokenData
from vistok.tokenizers.titok import TiTok, TiTokConfig, ViTSize, key_table

BARS = {"float32": 1.15, "bfloat16": 2.4}


# -- the plain implementation ----------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(size.width)
        self.attn = nn.MultiheadAttention(size.width, size.heads)
        self.ln_2 = nn.LayerNorm(size.width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(size.width, 4 * size.width), "c_proj": nn.Linear(4 * size.width, size.width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PlainViT(nn.Module):
    """What the two sides share; positions are (N, B, W) inside."""

    def __init__(self, config: TiTokConfig, size: ViTSize, patch: int) -> None:
        super().__init__()
        width, cells = size.width, (config.image_size // patch) ** 2
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(cells + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(config.tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(PlainBlock(size) for _ in range(size.layers))
        self.ln_post = nn.LayerNorm(width)

    def run(self, x: Tensor) -> Tensor:
        x = self.ln_pre(x).permute(1, 0, 2)
        for block in self.transformer:
            x = block(x)
        return x.permute(1, 0, 2)


class PlainEncoder(PlainViT):
    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, config.encoder, config.encoder_patch)
        width, patch = config.encoder.width, config.encoder_patch
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.conv_out = nn.Conv2d(width, config.token_dim, 1)

    def forward(self, pixels: Tensor, latent_tokens: Tensor) -> Tensor:
        batch, count = len(pixels), len(latent_tokens)
        x = self.patch_embed(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), x], 1) + self.positional_embedding
        latents = latent_tokens.expand(batch, -1, -1) + self.latent_token_positional_embedding
        x = self.ln_post(self.run(torch.cat([x, latents], 1))[:, -count:])
        return self.conv_out(x.reshape(batch, -1, count, 1)).reshape(batch, -1, 1, count)


class PlainDecoder(PlainViT):
    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, config.decoder, config.decoder_patch)
        width = config.decoder.width
        self.grid = config.image_size // config.decoder_patch
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_embed = nn.Linear(config.token_dim, width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, config.proxy_codes, 1))

    def forward(self, quantized: Tensor) -> Tensor:
        batch = len(quantized)
        latents = self.decoder_embed(quantized[:, :, 0].permute(0, 2, 1)) + self.latent_token_positional_embedding
        masks = self.mask_token.expand(batch, self.grid**2, -1)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), masks], 1) + self.positional_embedding
        x = self.run(torch.cat([x, latents], 1))[:, 1 : self.grid**2 + 1]
        return self.ffn(self.ln_post(x).permute(0, 2, 1).reshape(batch, -1, self.grid, self.grid))


class PlainResBlock(nn.Module):
    def __init__(self, entering: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, entering, 1e-6), nn.GroupNorm(32, width, 1e-6)
        self.conv1 = nn.Conv2d(entering, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        if entering != width:
            self.nin_shortcut = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class PlainCNN(nn.Module):
    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        cnn = config.pixel_decoder
        assert cnn is not None
        widths = [*cnn.widths, cnn.widths[-1]]
        self.conv_in = nn.Conv2d(cnn.latent_dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(PlainResBlock(widths[-1], widths[-1]) for _ in range(cnn.blocks))
        self.up = nn.ModuleList()
        for level in range(len(cnn.widths)):
            part = nn.Module()
            entering = [widths[level + 1], *[widths[level]] * (cnn.blocks - 1)]
            part.block = nn.ModuleList(PlainResBlock(width, widths[level]) for width in entering)
            if level:
                part.upsample_conv = nn.Conv2d(widths[level], widths[level], 3, padding=1)
            self.up.append(part)
        self.norm_out = nn.GroupNorm(32, widths[0], 1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(range(len(self.up))):
            for block in self.up[level].block:  # type: ignore[union-attr]
                x = block(x)
            if level:
                x = self.up[level].upsample_conv(F.interpolate(x, scale_factor=2.0))  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(x)))


class Plain(nn.Module):
    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        cnn = config.pixel_decoder
        assert cnn is not None
        self.latent_tokens = nn.Parameter(torch.empty(config.tokens, config.encoder.width))
        self.encoder, self.decoder, self.pixel_decoder = PlainEncoder(config), PlainDecoder(config), PlainCNN(config)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.token_dim)})
        self.pixel_quantize = nn.ModuleDict({"embedding": nn.Embedding(config.proxy_codes, cnn.latent_dim)})

    def encode(self, pixels: Tensor) -> Tensor:
        z = self.encoder(pixels, self.latent_tokens).float().permute(0, 2, 3, 1)
        rows = F.normalize(z.flatten(0, 2), dim=1)
        table = F.normalize(self.quantize["embedding"].weight.float(), dim=1)
        distances = rows.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * rows @ table.T
        return distances.argmin(1).view(len(pixels), -1)

    def decode(self, codes: Tensor) -> Tensor:
        table = self.quantize["embedding"].weight
        quantized = F.normalize(F.embedding(codes, table), dim=2).permute(0, 2, 1)[:, :, None]
        probabilities = self.decoder(quantized).softmax(1)
        expected = torch.einsum("nchw,cd->ndhw", probabilities, self.pixel_quantize["embedding"].weight)
        return self.pixel_decoder(expected.contiguous()).clamp(0, 1)


# -- the race --------------------------------------------------------------------------------------------------------


def contestants(model: TiTok) -> dict[str, Racer]:
    """All with the weights of `model`; the plain float32 one comes first."""
    with torch.device("meta"):
        plain, plain_half, half = Plain(model.config), Plain(model.config), TiTok(model.config)
    plain.load_state_dict(key_table(model.config).to_theirs(model.state_dict()), assign=True)
    plain_half.load_state_dict({name: value.bfloat16() for name, value in plain.state_dict().items()}, assign=True)
    half.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()}, assign=True)
    half.quantizer.usage = model.quantizer.usage  # its counts are no part of the state dict
    return {
        "plain float32": Racer(plain.eval().encode, plain.decode, torch.float32),
        "vistok float32": _ours(model.eval()),
        "plain bfloat16": Racer(plain_half.eval().encode, plain_half.decode, torch.bfloat16),
        "vistok bfloat16": _ours(half.eval()),
    }


def _ours(tok: TiTok) -> Racer:
    def encode(pixels: Tensor) -> Tensor:
        codes = tok.tokenize(pixels, tok.spec, seeds=[0] * len(pixels)).codes
        assert codes is not None
        return codes

    def decode(codes: Tensor) -> Tensor:
        return tok.detokenize(TokenData(codes=codes), tok.spec, seeds=[0] * len(codes), dtype=tok.dtype)

    return Racer(encode, decode, tok.dtype)


def main() -> None:
    """Race, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="titok-l-32", help="a two-stage variant")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "titok.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = vistok.create(args.model)
    pixels = torch.rand(args.batch, 3, model.config.image_size, model.config.image_size)
    result = race(contestants(model), pixels, args.rounds)
    print(table(result))
    speed = {row["name"].removeprefix("vistok "): row["speed"] for row in result["rows"]}
    result |= {
        "command": f"python benchmarks/titok.py --model {args.model} --batch {args.batch} --rounds {args.rounds}",
        "bars": BARS,
        "met": {kind: speed[kind] >= bar for kind, bar in BARS.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"bars {BARS}: {result['met']} -> {args.out}")


if __name__ == "__main__":
    main()
