"""VAR scale by scale with kept keys and values, against the same network that reads all coarser scales anew each time.

    python benchmarks/var.py [--width 256] [--blocks 4] [--batch 4] [--rounds 5] [--out benchmarks/results/var.json]

Both draw the likeliest codes of all ten published scales (680 tokens) for the same classes under guidance, so the
network sees twice the batch. Without a cache a scale costs all positions up to it, 1710 for a picture instead of 680;
logits are computed for the new positions alone in both. `ratio` is the time without over that with the cache, the best
round of each, and its bar is 1.8; `cpu` is the same by processor time, which other programs disturb less. Weights are
random. `differ` is the share of codes that are not the same, where two are equally likely up to rounding.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from race import machine
from torch import Tensor

from vistok.generators.var import VAR, VARConfig
from vistok.nn.scale_transformer import ScaleTransformerSize
from vistok.sampling.tokens import guide

BAR = 1.8


def build(width: int, blocks: int) -> VAR:
    """A VAR of the published scales with random weights."""
    torch.manual_seed(0)
    model = VAR(VARConfig(ScaleTransformerSize(width, blocks, width // 64), gate_init=1.0)).eval()
    model.quantizer.codebook.data.normal_()
    model.head.weight.data.mul_(50)  # which starts near zero: codes would differ by rounding alone
    return model


@torch.no_grad()
def with_cache(model: VAR, labels: Tensor, guidance: float) -> Tensor:
    """Codes (B, N) by `generate`."""
    codes = model.generate(labels, guidance=guidance, temperature=0.0).codes
    assert codes is not None
    return codes


@torch.no_grad()
def without_cache(model: VAR, labels: Tensor, guidance: float) -> Tensor:
    """The same codes, every scale from all positions up to it."""
    condition = model.class_table(torch.cat([labels, torch.full_like(labels, model.null)]))
    inputs = [condition.new_zeros(len(labels), 0, model.config.code_dim)]
    f_hat, found = None, []
    for scale, (last, count) in enumerate(zip(model.ends, model.lengths, strict=True)):
        x = model.embedded(torch.cat(inputs, 1), condition, 0, last)
        state = model.trunk(x, condition, mask=model.mask[:last, :last])[:, -count:]
        place = scale / (len(model.ends) - 1)
        codes = guide(model.outputs(state, condition), model.guidance_at(guidance, place)).argmax(-1)
        f_hat, following = model.quantizer.advance(scale, codes, f_hat)
        found.append(codes)
        if following is not None:
            inputs.append(following)
    return torch.cat(found, 1)


def main() -> None:
    """Run, print and write the result."""
    parser = argparse.ArgumentParser()
    for name, value in {"width": 256, "blocks": 4, "batch": 4, "rounds": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, labels, guidance = build(options.width, options.blocks), torch.arange(options.batch), 2.5
    ways: dict[str, Callable[[VAR, Tensor, float], Tensor]] = {"with": with_cache, "without": without_cache}
    load = os.getloadavg()[0]
    codes = {name: way(model, labels, guidance) for name, way in ways.items()}  # the warm-up
    wall: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            began, processor = time.perf_counter(), time.process_time()
            way(model, labels, guidance)
            wall[name].append(time.perf_counter() - began)
            used[name].append(time.process_time() - processor)
    result = {
        "command": f"python benchmarks/var.py --width {options.width} --blocks {options.blocks} "
        f"--batch {options.batch} --rounds {options.rounds} --threads {options.threads}",
        "machine": machine(),
        "load_before": load,
        "torch": torch.__version__,
        "bar": BAR,
        "images_per_second": {name: options.batch / min(times) for name, times in wall.items()},
        "ratio": min(wall["without"]) / min(wall["with"]),
        "cpu": min(used["without"]) / min(used["with"]),
        "differ": float((codes["with"] != codes["without"]).double().mean()),
        "seconds_of_rounds": wall,
    }
    rates = {name: options.batch / min(times) for name, times in wall.items()}
    print(
        f"with cache {rates['with']:.2f} images/s, without {rates['without']:.2f}: {result['ratio']:.2f}x (bar {BAR})"
    )
    print(f"by processor time {result['cpu']:.2f}x; {result['differ']:.4f} of the codes differ")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
