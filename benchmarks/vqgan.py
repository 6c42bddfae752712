"""LlamaGen's VQ-16, encode and decode of a batch of 8, against a plain implementation in the authors' style.

    python benchmarks/vqgan.py [--model vqgan-llamagen-f16] [--batch 8] [--rounds 3] [--threads 2] [--out FILE]

Random weights, the same in all: `plain` takes ours through the authors' key names. It is written as research code is:
convolutions in PyTorch's default layout, activations that are not in place, three 1x1 convolutions and two batched
products for attention, a doubled map before each upsampling convolution, and the whole table of distances to the
codebook. See race.py for how they run and what is reported.
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
from vistok.tokenizers.vqgan import VQGAN, VQGANConfig, key_table

BARS = {"float32": 1.15, "bfloat16": 2.4}


# -- the plain implementation ----------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, entering: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, entering, 1e-6), nn.GroupNorm(32, width, 1e-6)
        self.conv1 = nn.Conv2d(entering, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(entering, width, 1) if entering != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = self.conv1(h * torch.sigmoid(h))
        h = self.norm2(h)
        h = self.conv2(h * torch.sigmoid(h))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class PlainAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part.flatten(2) for part in (self.q(h), self.k(h), self.v(h)))
        weights = (torch.bmm(q.permute(0, 2, 1), k) * x.shape[1] ** -0.5).softmax(2)
        return x + self.proj_out(torch.bmm(v, weights.permute(0, 2, 1)).view_as(x))


def plain_level(entering: int, width: int, blocks: int, attends: bool) -> nn.Module:
    level = nn.Module()
    level.res = nn.ModuleList(PlainBlock(entering if i == 0 else width, width) for i in range(blocks))
    level.attn = nn.ModuleList(PlainAttention(width) for _ in range(blocks if attends else 0))
    return level


def run_level(level: nn.Module, x: Tensor) -> Tensor:
    for index, block in enumerate(level.res):  # type: ignore[arg-type]
        x = block(x)
        if len(level.attn):  # type: ignore[arg-type]
            x = level.attn[index](x)  # type: ignore[index]
    return x


def plain_middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([PlainBlock(width, width), PlainAttention(width), PlainBlock(width, width)])


class PlainEncoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, deepest = config.cnn.widths, len(config.cnn.widths) - 1
        self.conv_in = nn.Conv2d(3, config.cnn.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = plain_level(widths[max(i - 1, 0)], width, config.cnn.blocks, i == deepest)
            if i < deepest:
                level.downsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.conv_blocks.append(level)
        self.mid = plain_middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.cnn.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = run_level(level, x)
            if hasattr(level, "downsample"):
                x = level.downsample["conv"](F.pad(x, (0, 1, 0, 1)))  # type: ignore[index, operator]
        for part in self.mid:
            x = part(x)
        x = self.norm_out(x)
        return self.conv_out(x * torch.sigmoid(x))


class PlainDecoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, deepest = config.cnn.widths, len(config.cnn.widths) - 1
        self.conv_in = nn.Conv2d(config.cnn.latent_dim, widths[-1], 3, padding=1)
        self.mid = plain_middle(widths[-1])
        self.conv_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            level = plain_level(widths[min(i + 1, deepest)], widths[i], config.cnn.blocks + 1, i == deepest)
            if i:
                level.upsample = nn.ModuleDict({"conv": nn.Conv2d(widths[i], widths[i], 3, padding=1)})
            self.conv_blocks.append(level)
        self.norm_out = nn.GroupNorm(32, widths[0], 1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in self.mid:
            x = part(x)
        for level in self.conv_blocks:
            x = run_level(level, x)
            if hasattr(level, "upsample"):
                x = level.upsample["conv"](F.interpolate(x, scale_factor=2.0))  # type: ignore[index, operator]
        x = self.norm_out(x)
        return self.conv_out(x * torch.sigmoid(x))


class Plain(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.grid = config.resolution // config.cnn.factor
        self.encoder, self.decoder = PlainEncoder(config), PlainDecoder(config)
        self.quant_conv = nn.Conv2d(config.cnn.latent_dim, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.cnn.latent_dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.code_dim)})
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))

    def encode(self, pixels: Tensor) -> Tensor:
        z = self.quant_conv(self.encoder(pixels * 2 - 1)).float().permute(0, 2, 3, 1).contiguous()
        rows = F.normalize(z.flatten(0, 2), dim=-1)
        table = F.normalize(self.quantize["embedding"].weight.float(), dim=-1)
        distances = rows.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * rows @ table.T
        return distances.argmin(1).view(len(pixels), -1)

    def decode(self, codes: Tensor) -> Tensor:
        table = F.normalize(self.quantize["embedding"].weight, dim=-1)
        vectors = table[codes].view(len(codes), self.grid, self.grid, -1).permute(0, 3, 1, 2).contiguous()
        return ((self.decoder(self.post_quant_conv(vectors)) + 1) / 2).clamp(0, 1)


# -- the race --------------------------------------------------------------------------------------------------------


def contestants(model: VQGAN) -> dict[str, Racer]:
    """All with the weights of `model`."""
    plain, plain_half = Plain(model.config).eval(), Plain(model.config).eval().bfloat16()
    state = key_table(model.config).to_theirs(model.state_dict())
    for copy in (plain, plain_half):
        copy.load_state_dict(state)
    half = VQGAN(model.config).eval().bfloat16()
    half.load_state_dict(model.state_dict())

    def ours(tok: VQGAN) -> Racer:
        def encode(pixels: Tensor) -> Tensor:
            codes = tok.tokenize(pixels, tok.spec, seeds=[0] * len(pixels)).codes
            assert codes is not None
            return codes

        def decode(codes: Tensor) -> Tensor:
            return tok.detokenize(TokenData(codes), tok.spec, seeds=[0] * len(codes), dtype=tok.dtype)

        return Racer(encode, decode, tok.dtype)

    return {
        "plain float32": Racer(plain.encode, plain.decode, torch.float32),
        "vistok float32": ours(model),
        "plain bfloat16": Racer(plain_half.encode, plain_half.decode, torch.bfloat16),
        "vistok bfloat16": ours(half),
    }


def main() -> None:
    """Race, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vqgan-llamagen-f16", help="a LlamaGen variant")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vqgan.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = vistok.create(args.model)
    pixels = torch.rand(args.batch, 3, model.config.resolution, model.config.resolution)
    result = race(contestants(model), pixels, args.rounds)
    print(table(result))
    speed = {row["name"].removeprefix("vistok "): row["speed"] for row in result["rows"]}
    result |= {
        "command": f"python benchmarks/vqgan.py --model {args.model} --batch {args.batch} --rounds {args.rounds}"
        f" --threads {args.threads}",
        "bars": BARS,
        "met": {kind: speed[kind] >= bar for kind, bar in BARS.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"bars {BARS}: {result['met']} -> {args.out}")


if __name__ == "__main__":
    main()
