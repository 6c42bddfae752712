"""LlamaGen's claim at small scale: a plain autoregressive model against diffusion of equal size, on the same tokens.

CIFAR-10 -> VQ-VAE, f = 4, 512 unit vectors of 8 numbers -> codes (50000, 64)                      shared by all
codes -> GPT of 4 blocks, width 96 or 48 -> codes                            -> decoder -> 1,000 pictures -> judge
codes -> their vectors (64, 8) -> DiT of 4 blocks, width 96, rectified flow, 25 steps -> nearest codes -> the same
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.evaluation.reproduction import Arm, Condition, Reproduction, difference, of, ratio
from vistok.generator import drop_labels
from vistok.metrics.frechet import frechet_distance
from vistok.nn.positions import sincos_1d, sincos_2d
from vistok.nn.transformer import AdaBlock, Modulation, modulate
from vistok.reproductions._generation import (
    CLASSES,
    GRID,
    ITEMS,
    SIDE,
    distance_to_training,
    drawn,
    encoded,
    judged_samples,
    judgements,
    shared_judge,
    small_tokenizer,
    token_batches,
    training_codes,
)
from vistok.reproductions._small import fit, shared
from vistok.sampling.flow import draw_times, euler, interpolate
from vistok.sampling.noise import normals
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

if TYPE_CHECKING:
    from vistok.evaluation.reproducing import Context
    from vistok.generators.llamagen import LlamaGen

DEPTH, HEADS, DIM, DROPOUT = 4, 4, 8, 0.1
TOKENIZER_STEPS, JUDGE_STEPS = 1000, 500
SAMPLES, TEST_ITEMS, FLOW_STEPS = 1000, 2000, 25
GUIDANCES = (1.0, 1.5, 2.0)


class SmallDiT(nn.Module):
    """The rival: velocities (B, N, D) of noisy vectors (B, N, D) at times (B,), for classes (B,); the last is none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(DIM, width)
        self.register_buffer("positions", sincos_2d(*GRID, width))
        self.classes = nn.Embedding(CLASSES + 1, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(AdaBlock(width, HEADS, width) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(width, width, 2)
        self.leave = nn.Linear(width, DIM)
        nn.init.normal_(self.classes.weight, std=0.02)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        width = self.enter.out_features
        condition = self.time(sincos_1d(1000 * t, width).to(x.device)) + self.classes(labels)
        x = self.enter(x) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(modulate(self.norm(x), *self.modulation(condition)))

    def loss(self, vectors: Tensor, labels: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Squared error of the velocity at one uniform time an item."""
        times = draw_times(len(vectors), rng)
        x, velocity = interpolate(vectors, torch.randn(vectors.shape, generator=rng), times)
        labels = drop_labels(labels, DROPOUT, CLASSES, rng)
        return {"squared": F.mse_loss(self(x, times, labels).float(), velocity)}

    @torch.no_grad()
    def sample(self, labels: Tensor, guidance: float, seeds: list[int]) -> Tensor:
        """Vectors (B, N, D) after 25 steps; a doubled batch where guided."""
        noise = normals(seeds, (GRID[0] * GRID[1], DIM))
        branches = [labels] if guidance == 1 else [labels, torch.full_like(labels, CLASSES)]

        def velocity(x: Tensor, t: float) -> Tensor:
            found = self(x.repeat(len(branches), 1, 1), torch.full((len(x) * len(branches),), t), torch.cat(branches))
            return found if guidance == 1 else found[len(x) :].lerp(found[: len(x)], guidance)

        return euler(velocity, noise, FLOW_STEPS)


def flow_vectors(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Code vectors (B, N, D) of codes (B, N), scaled to a variance of about 1."""
    return F.normalize(tokenizer.quantizer.decode(codes), dim=-1) * DIM**0.5  # type: ignore[operator]


def flow_codes(tokenizer: Tokenizer, vectors: Tensor) -> Tensor:
    """The nearest codes (B, N)."""
    return tokenizer.quantizer.encode(vectors)  # type: ignore[operator]


def autoregressive(seed: int, context: "Context", *, width: int, examined: bool) -> dict[str, float]:
    """A GPT's cross-entropy on test pictures and, of the large one, what the judge says of its samples."""
    from vistok.generators.llamagen import LlamaGen, LlamaGenConfig
    from vistok.nn.gpt import GPTSize

    tokenizer = small_tokenizer(context, TOKENIZER_STEPS)
    torch.manual_seed(seed)
    model = LlamaGen(
        LlamaGenConfig(
            GPTSize(width, DEPTH, HEADS, dropout=0.0),
            tokenizer.spec.at((SIDE, SIDE)).segments,
            size=SIDE,
            classes=CLASSES,
            class_dropout=DROPOUT,
            token_dropout=0.0,
        )
    ).attach(tokenizer)
    assert isinstance(model, LlamaGen)
    data = token_batches(training_codes(context, tokenizer), context.batch, seed)
    fit(model, model.loss, data, context.steps, seed=seed, bf16=True, tell=context.tell)
    found = {"nll": cross_entropy(model, context, tokenizer), "parameters": parameters(model)}
    if not examined:
        return found

    def draw(guidance: float) -> tuple[Tensor, Tensor]:
        return drawn(model, tokenizer, SAMPLES, seed, at_once=250, guidance=guidance, top_k=0)

    return found | judged(draw, context)


def flow(seed: int, context: "Context", *, width: int) -> dict[str, float]:
    """The same of the DiT, whose vectors are rounded to codes before the same decoder."""
    tokenizer = small_tokenizer(context, TOKENIZER_STEPS)
    torch.manual_seed(seed)
    model = SmallDiT(width)
    data = token_batches(training_codes(context, tokenizer), context.batch, seed)

    def loss(batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
        return model.loss(flow_vectors(tokenizer, batch["codes"]), batch["label"], rng)

    fit(model, loss, data, context.steps, seed=seed, bf16=True, tell=context.tell)

    def draw(guidance: float) -> tuple[Tensor, Tensor]:
        labels = torch.arange(SAMPLES) % CLASSES
        pictures = []
        for first in range(0, SAMPLES, 250):
            part = labels[first : first + 250]
            seeds = [seed * SAMPLES + first + item for item in range(len(part))]
            pictures.append(decoded(tokenizer, flow_codes(tokenizer, model.sample(part, guidance, seeds))))
        return torch.cat(pictures), labels

    return {"parameters": parameters(model)} | judged(draw, context)


def judged(draw: Callable[[float], tuple[Tensor, Tensor]], context: "Context") -> dict[str, float]:
    """The judge's words on samples at the guidance that is best by training pictures, and on guidance 1 and 2."""
    shared_judge(context, JUDGE_STEPS)
    tried = {}
    for guidance in GUIDANCES:
        context.tell(f"{SAMPLES} pictures with guidance {guidance:g}")
        tried[guidance] = draw(guidance)
    distances = {guidance: distance_to_training(pixels, context) for guidance, (pixels, _) in tried.items()}
    best = min(distances, key=lambda guidance: distances[guidance])
    told = {guidance: judged_samples(*tried[guidance], context) for guidance in (1.0, 2.0, best)}
    spreads = {guidance: spread(tried[guidance][0], context) for guidance in (1.0, 2.0)}
    return {
        **told[best],
        "guidance": best,
        "fd_1": told[1.0]["fd"],
        "accuracy_gain": 100 * (told[2.0]["accuracy"] - told[1.0]["accuracy"]),
        "spread_ratio": spreads[2.0] / spreads[1.0],
        "fd_floor": rebuilt_distance(context),
    }


@torch.no_grad()
def spread(pixels: Tensor, context: "Context") -> float:
    """Mean distance between the judge's features of two pictures."""
    features = judgements(shared_judge(context), pixels)[0]
    return float(torch.pdist(features).mean())


@torch.no_grad()
def cross_entropy(model: "LlamaGen", context: "Context", tokenizer: Tokenizer) -> float:
    """Nats a code on the first test pictures."""
    pixels, labels = context.test_pixels(SIDE, TEST_ITEMS)
    found = shared(context, "test-codes", lambda: {"codes": encoded(tokenizer, pixels)})["codes"]
    rng = torch.Generator()
    pairs = zip(found.split(250), labels.split(250), strict=True)
    terms = [model.loss({"codes": codes, "label": part}, 0, rng)["cross_entropy"] for codes, part in pairs]
    return float(torch.stack(terms).double().mean())


def rebuilt_distance(context: "Context") -> float:
    """Frechet distance of as many rebuilt test pictures: what the tokenizer alone costs."""

    def make() -> dict[str, Tensor]:
        tokenizer, pixels = small_tokenizer(context, TOKENIZER_STEPS), context.test_pixels(SIDE, 10_000)[0]
        judge = shared_judge(context)
        back = decoded(tokenizer, encoded(tokenizer, pixels[:SAMPLES]))
        real, found = judgements(judge, pixels)[0], judgements(judge, back)[0]
        return {"fd": torch.tensor(frechet_distance(found, real))}

    return float(shared(context, "rebuilt", make)["fd"])


def decoded(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Pictures, uint8 (B, 3, 32, 32), of codes (B, N)."""
    spec = tokenizer.spec.at((SIDE, SIDE))
    tokens = Tokens(spec.segments, codes=codes, canvas=(spec.canvas,) * len(codes), source=tokenizer.source)
    return tokenizer.decode(tokens, dtype=torch.uint8)


def parameters(model: nn.Module) -> float:
    """How many there are."""
    return float(sum(parameter.numel() for parameter in model.parameters()))


REPRODUCTION = Reproduction(
    slug="llamagen",
    title="LlamaGen: a plain autoregressive model against diffusion of equal size",
    claim="an autoregressive model without inductive biases for pictures reaches or beats diffusion, it scales, and "
    "classifier-free guidance is essential",
    source="arXiv:2406.06525, tables 4 and 6",
    checked=f"Frechet distance of {SAMPLES} pictures in the features of a small classifier trained here, each arm at "
    "the guidance of 1, 1.5 and 2 that is best by training pictures; cross-entropy on test pictures. 600 steps of 64, "
    "where 1,500 were foreseen: less than one epoch, so that all arms fit into about 20 minutes of a core. Small "
    "diffusion models learn slowly, so a win here says little about large ones; the distance at half of the training "
    "is not looked at. The DiT's vectors are rounded to codes, which it was not trained for. Floor of the tokenizer: "
    f"fd_floor, of {ITEMS} pictures' codes trained for {TOKENIZER_STEPS} steps.",
    baseline="flow",
    arms={
        "gpt": Arm("GPT of width 96 and 4 blocks over 64 codes", partial(autoregressive, width=96, examined=True), 4),
        "flow": Arm("DiT of the same width and depth, rectified flow in the code vectors", partial(flow, width=96), 4),
        "small": Arm("GPT of width 48 and 4 blocks", partial(autoregressive, width=48, examined=False), 1.5),
    },
    rule=(
        Condition("Frechet distance, autoregressive over flow", ratio("fd", "gpt", "flow"), at_most=0.95),
        Condition("nats a code that half the width costs", difference("nll", "small", "gpt"), at_least=0.03),
        Condition("points of accuracy from guidance 1 to 2", of("gpt", "accuracy_gain"), at_least=10),
        Condition("mean distance between pictures, guidance 2 over 1", of("gpt", "spread_ratio"), at_most=1.0),
    ),
    steps=600,
    batch=64,
    report=("fd", "fd_1", "accuracy", "real_accuracy", "guidance", "nll", "fd_floor", "parameters"),
)
