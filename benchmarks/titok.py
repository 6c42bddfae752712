"""TiTok-L-32, encode and decode of a batch of 8, against a plain implementation in the authors' style, side by side.

    python benchmarks/titok.py [--batch 8] [--rounds 3] [--threads 2] [--out benchmarks/results/titok.json]

Random weights, the same in all: `plain` takes ours through the authors' key names. It is written as research code is:
sequence-first attention of `torch.nn`, every position through every layer, convolutions in PyTorch's default layout, a
doubled map before each upsampling convolution, and the whole table of distances to the codebook. Contestants take turns
within a round, and so does a square matrix product, this machine's own peak; the time of each is its best round.

`speed` is plain float32's time over the contestant's. `done` is the arithmetic that a contestant really carries out, in
GFLOP an image, and `of peak` its rate over the matrix product's in the same type. `flips` is the share of codes that
differ from plain float32's.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vistok
from vistok.tokenizers.titok import TiTok, TiTokConfig, ViTSize, key_table

BARS = {"float32": 1.15, "bfloat16": 2.4}
SIDE = 4096  # of the matrices whose product is the peak


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


def contestants(model: TiTok) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], torch.dtype]]:
    """Name -> (pixels to codes, codes to pixels, dtype), all with the weights of `model`."""
    with torch.device("meta"):
        plain = Plain(model.config)
    plain.load_state_dict(key_table(model.config).to_theirs(model.state_dict()), assign=True)
    plain.eval()
    with torch.device("meta"):
        half, plain_half = TiTok(model.config), Plain(model.config)
    half.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()}, assign=True)
    plain_half.load_state_dict({name: value.bfloat16() for name, value in plain.state_dict().items()}, assign=True)
    half.quantizer.usage = model.quantizer.usage  # its counts are no part of the state dict
    spec = model.spec

    def ours(tok: TiTok) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        tok.eval()

        def decode(codes: Tensor) -> Tensor:
            return tok.detokenize(vistok_data(codes), spec, seeds=[0] * len(codes), dtype=tok.dtype)

        return lambda pixels: tok.tokenize(pixels, spec, seeds=[0] * len(pixels)).codes, decode  # type: ignore[return-value]

    return {
        "plain float32": (plain.encode, plain.decode, torch.float32),
        "vistok float32": (*ours(model), torch.float32),
        "plain bfloat16": (plain_half.eval().encode, plain_half.decode, torch.bfloat16),
        "vistok bfloat16": (*ours(half), torch.bfloat16),
    }


def vistok_data(codes: Tensor) -> Any:
    from vistok.tokenizer import TokenData

    return TokenData(codes=codes)


def timed(function: Callable[[Tensor], Tensor], argument: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = function(argument)
    return time.perf_counter() - start, result


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a square matrix product, the best of a few."""
    a, b = torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    best = min(timed(lambda x: torch.mm(x, b, out=out), a)[0] for _ in range(4))
    return 2 * SIDE**3 / best / 1e9


def gflop(function: Callable[[Tensor], Tensor], argument: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        function(argument)
    return counter.get_total_flops() / len(argument) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="titok-l-32", help="a two-stage variant")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "titok.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    model = vistok.create(args.model)
    pixels = torch.rand(args.batch, 3, model.config.image_size, model.config.image_size)
    racers = contestants(model)
    done, seconds, peaks = {}, {}, {"float32": 0.0, "bfloat16": 0.0}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        codes = racers["plain float32"][0](pixels)
        for name, (encode, decode, dtype) in racers.items():  # counting is the warm-up
            done[name] = {"encode": gflop(encode, pixels[:1].to(dtype)), "decode": gflop(decode, codes[:1])}
            seconds[name] = {"encode": [], "decode": []}
        for _ in range(args.rounds):
            for name, (encode, decode, dtype) in racers.items():
                kind = str(dtype).removeprefix("torch.")
                peaks[kind] = max(peaks[kind], peak(dtype))
                spent, own = timed(encode, pixels.to(dtype))
                seconds[name]["encode"].append(spent)
                spent, picture = timed(decode, codes)
                seconds[name]["decode"].append(spent)
                results[name] = own, picture
    rows = [summary(name, racers[name][2], args.batch, done, seconds, peaks, results) for name in racers]
    print(table(rows, peaks))
    met = {
        kind: next(row["speed"] for row in rows if row["name"] == f"vistok {kind}") >= bar for kind, bar in BARS.items()
    }
    result = {
        "command": f"python benchmarks/titok.py --model {args.model} --batch {args.batch} --rounds {args.rounds}",
        "threads": args.threads,
        "machine": machine(),
        "load_before": load,
        "torch": torch.__version__,
        "peak_gflops": peaks,
        "bars": BARS,
        "met": met,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"bars {BARS}: {met} -> {args.out}")


def summary(
    name: str, dtype: torch.dtype, batch: int, done: Any, seconds: Any, peaks: dict[str, float], results: Any
) -> dict[str, Any]:
    kind = str(dtype).removeprefix("torch.")
    best = {stage: min(times) for stage, times in seconds[name].items()}
    base = {stage: min(times) for stage, times in seconds["plain float32"].items()}
    codes, pixels = results[name]
    right_codes, right_pixels = results["plain float32"]
    total = best["encode"] + best["decode"]
    return {
        "name": name,
        "seconds": best,
        "seconds_of_rounds": seconds[name],
        "speed": (base["encode"] + base["decode"]) / total,
        "speed_of_stage": {stage: base[stage] / best[stage] for stage in best},
        "gflop_per_image": done[name],
        "of_peak": batch * sum(done[name].values()) / total / peaks[kind],
        "of_peak_of_stage": {stage: batch * done[name][stage] / best[stage] / peaks[kind] for stage in best},
        "flips": (codes != right_codes).float().mean().item(),
        "largest_pixel_difference": (pixels.float() - right_pixels).abs().max().item(),
    }


def table(rows: list[dict[str, Any]], peaks: dict[str, float]) -> str:
    lines = [f"matrix product: {peaks['float32']:.0f} GFLOP/s in float32, {peaks['bfloat16']:.0f} in bfloat16"]
    lines.append(
        "                 encode s  decode s   speed  (encode, decode)   done   of peak  (encode, decode)   flips"
    )
    for row in rows:
        stages, shares = row["speed_of_stage"], row["of_peak_of_stage"]
        lines.append(
            f"{row['name']:<16} {row['seconds']['encode']:8.2f} {row['seconds']['decode']:9.2f} {row['speed']:6.2f}x"
            f"  ({stages['encode']:.2f}, {stages['decode']:.2f})      {sum(row['gflop_per_image'].values()):6.0f}"
            f"   {row['of_peak']:6.2f}  ({shares['encode']:.2f}, {shares['decode']:.2f})      {row['flips']:7.4f}"
        )
    return "\n".join(lines)


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            flags = Path("/proc/cpuinfo").read_text()
            units = "with bf16 matrix units" if "amx_bf16" in flags else "without bf16 matrix units"
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores, {units}"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
