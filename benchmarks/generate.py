"""Autoregressive generation against an implementation in the authors' style, side by side: time a step and same codes.

    python benchmarks/generate.py [--threads 1] [--codes 256] [--rounds 2] [--out benchmarks/results/generate.json]

LlamaGen-B (111 M parameters, random weights), a batch of 8 with guidance, so 16 sequences; codes are drawn with
temperature 1 and top-k 2000, the authors' demo. `plain` does what their sampler does, step for step: a mask over all
positions for every sequence, indexed anew; a cache written by index, read whole and copied head by head; attention as
two products; rotation by stacks of products; separate gate and value maps; logits of both halves in float32; softmax
and a multinomial draw. Contestants take turns within a round; the best round of each counts, and processor time beside
it, which other programs on the machine disturb less.

`codes equal` is of greedy decodes (`--greedy` codes each), where nothing is drawn. `of the floor`: the least time in
which this machine could read the weights and the filled part of the cache once, from the rate of a plain sum, over the
time taken.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vistok
from vistok.environment import environment
from vistok.generators.llamagen import LlamaGen

BAR = 3.0
GUIDANCE, TOP_K = 2.0, 2000


class Plain:
    """The authors' way through the same weights."""

    def __init__(self, model: LlamaGen) -> None:
        self.model, size = model, model.config.trunk
        self.heads, self.head, self.eps = size.heads, size.head, size.eps
        self.gates = [block.mlp.expand.weight.chunk(2) for block in model.trunk]
        rotation = model.rotation()
        self.turns = torch.stack([rotation.cos, rotation.sin], -1)

    def begin(self, sequences: int, length: int) -> None:
        """Caches and masks of a run."""
        room = (length + 7) // 8 * 8
        shape = (sequences, self.heads, room, self.head)
        dtype = self.model.dtype
        self.cache = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in self.model.trunk]
        self.mask = torch.ones(room, room, dtype=torch.bool).tril().unsqueeze(0).repeat(sequences, 1, 1)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, in float32."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * weight

    def turn(self, x: Tensor, turns: Tensor) -> Tensor:
        """Rotation of (B, n, heads, head)."""
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns[None, :, None, :, 0], turns[None, :, None, :, 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)

    def step(self, x: Tensor, at: Tensor) -> Tensor:
        """Logits (B, V), float32, of the position `at` whose input is x (B, 1, W)."""
        mask, turns = self.mask[: len(x), None, at], self.turns[at]
        for block, (keys, values), (gate, value) in zip(self.model.trunk, self.cache, self.gates, strict=True):
            qkv = F.linear(self.norm(x, block.norm1.weight), block.attention.qkv.weight)
            q, k, v = (part.unflatten(-1, (self.heads, self.head)) for part in qkv.chunk(3, -1))
            q, k, v = (part.transpose(1, 2) for part in (self.turn(q, turns), self.turn(k, turns), v))
            keys[:, :, at] = k
            values[:, :, at] = v
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(
                    q, keys.repeat_interleave(1, dim=1), values.repeat_interleave(1, dim=1), attn_mask=mask
                )
            x = x + F.linear(out.transpose(1, 2).contiguous().flatten(2), block.attention.out.weight)
            h = self.norm(x, block.norm2.weight)
            x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, value), block.mlp.contract.weight)
        return F.linear(self.norm(x, self.model.norm.weight), self.model.output.weight).float()[:, -1]

    @torch.no_grad()
    def generate(self, labels: Tensor, codes: int, *, greedy: bool, seed: int = 0) -> Tensor:
        """Codes (B, n)."""
        torch.manual_seed(seed)
        both = torch.cat([labels, torch.full_like(labels, self.model.null)])
        self.begin(len(both), 1 + self.model.spec.length)
        x, at, found = self.model.class_table(both)[:, None], torch.zeros(1, dtype=torch.long), []
        for _ in range(codes):
            conditional, free = self.step(x, at).chunk(2)
            logits = free + (conditional - free) * GUIDANCE
            if greedy:
                code = logits.softmax(-1).topk(1).indices
            else:
                logits[logits < logits.topk(TOP_K).values[:, -1:]] = -torch.inf
                code = logits.softmax(-1).multinomial(1)
            found.append(code.clone())
            x, at = self.model.table(torch.cat([code, code])), at + 1
        return torch.cat(found, 1)


def ours(model: LlamaGen, labels: Tensor, codes: int, *, greedy: bool, seed: int = 0) -> Tensor:
    """The first `codes` codes (B, n), through `generate`."""
    settings: dict[str, Any] = {"temperature": 0} if greedy else {"temperature": 1, "top_k": TOP_K}
    return model.generate(labels, guidance=GUIDANCE, seed=seed, **settings).codes[:, :codes]


def build(dtype: torch.dtype, codes: int) -> LlamaGen:
    """LlamaGen-B with random weights, whose logits differ enough to have a largest one."""
    torch.manual_seed(0)
    model = vistok.create("llamagen-b", dtype=dtype)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    if codes == model.spec.length:
        return model
    rows = codes // 16
    segments = (replace(model.config.segments[0], shape=(rows, 16)),)
    short = LlamaGen(replace(model.config, segments=segments)).to(dtype).eval()
    short.load_state_dict(model.state_dict())
    return short


def floor(model: LlamaGen, sequences: int, codes: int) -> float:
    """Seconds a step in which the weights that are multiplied and half of the cache could be read once."""
    size = model.config.trunk
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
    cache = 2 * size.depth * sequences * size.width * (codes + 1) / 2
    block = torch.ones(100_000_000)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    rate = 4 * block.numel() / min(times)
    return (weights + cache) * model.output.weight.element_size() / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--codes", type=int, default=256, help="a multiple of 16, at most 256")
    parser.add_argument("--greedy", type=int, default=64, help="codes of the greedy decodes that are compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    labels, load = torch.arange(args.batch) * 97 % 1000, os.getloadavg()[0]
    runs: dict[str, Any] = {}
    equal: dict[str, float] = {}
    floors: dict[str, float] = {}
    for kind in args.dtypes:
        dtype = getattr(torch, kind)
        model = build(dtype, args.codes)
        small = build(dtype, args.greedy)
        pair = Plain(small).generate(labels, args.greedy, greedy=True), ours(small, labels, args.greedy, greedy=True)
        equal[kind] = (pair[0] == pair[1]).float().mean().item()
        floors[kind] = floor(model, 2 * args.batch, args.codes)
        runs[f"plain {kind}"] = lambda seed, model=model: Plain(model).generate(
            labels, args.codes, greedy=False, seed=seed
        )
        runs[f"vistok {kind}"] = lambda seed, model=model: ours(model, labels, args.codes, greedy=False, seed=seed)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(args.rounds):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            run(seed)
            wall[name].append((time.perf_counter() - start) / args.codes)
            cpu[name].append((time.process_time() - used) / args.codes)
    rows, base = [], next(iter(runs))
    for name in runs:
        kind = name.split()[1]
        rows.append(
            {
                "name": name,
                "milliseconds_a_step": 1e3 * min(wall[name]),
                "cpu_milliseconds_a_step": 1e3 * min(cpu[name]),
                "speed": min(wall[base]) / min(wall[name]),
                "speed_cpu": min(cpu[base]) / min(cpu[name]),
                "speed_over_plain": min(wall[f"plain {kind}"]) / min(wall[name]),
                "speed_cpu_over_plain": min(cpu[f"plain {kind}"]) / min(cpu[name]),
                "floor_milliseconds": 1e3 * floors[kind],
                "of_floor": floors[kind] / min(wall[name]),
                "milliseconds_of_rounds": [1e3 * value for value in wall[name]],
            }
        )
        shown = rows[-1]
        print(
            f"{name:18} {shown['milliseconds_a_step']:7.1f} ms a step ({shown['cpu_milliseconds_a_step']:.1f} cpu), "
            f"{shown['speed_over_plain']:.2f}x plain ({shown['speed_cpu_over_plain']:.2f}x cpu), "
            f"{shown['of_floor']:.2f} of the floor"
        )
    print(f"codes equal: {equal}; load {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    if args.out:
        options = f"--threads {args.threads} --codes {args.codes} --batch {args.batch} --rounds {args.rounds}"
        result = {
            "command": f"python benchmarks/generate.py {options}",
            "bar": BAR,
            "rows": rows,
            "codes_equal": equal,
            "load": [load, os.getloadavg()[0]],
            "environment": environment(),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
