"""DivPrune's claim at small scale: tokens that differ from each other answer better than important or random ones.

A canvas of four test pictures is 64 visual tokens, the map of a small CNN. A reader (two transformer layers) is asked
for the class of the picture in one quadrant; it was trained on all 64 tokens and is tested on k of them, chosen by one
who does not know the question. No large multimodal model fits here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.evaluation.reproducing import Context
from vistok.evaluation.reproduction import Arm, Condition, Numbers, Quantity, Reproduction, of
from vistok.nn.transformer import Block
from vistok.reducer import take
from vistok.reducers.divprune import distances, select
from vistok.reproductions._small import FEATURE, fit, shared, teacher

WIDTH, HEADS, QUADRANTS, CELLS = 64, 2, 4, 16
KEPT, RULED, DRAWS = (4, 6, 8, 12), (4, 6, 8), 5
TRAINED, TESTED, TEACHER_STEPS = 20_000, 2000, 500
LARGE_ITEMS, LARGE, SHARE = 300, 256, 26  # canvases of 16 pictures, their tokens, the tenth of them that is kept


class Reader(nn.Module):
    """[question | visual tokens] to one of ten classes. Where a token stands is told here, not to who chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURE, WIDTH)
        self.question = nn.Embedding(QUADRANTS, WIDTH)
        self.quadrant = nn.Embedding(QUADRANTS, WIDTH)
        self.cell = nn.Embedding(CELLS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def read(self, tokens: Tensor, places: Tensor, question: Tensor) -> Tensor:
        """(B, k, 64) at `places` (B, k) of the canvas, with the question before them: (B, 1 + k, W)."""
        x = self.project(tokens) + self.quadrant(places // CELLS) + self.cell(places % CELLS)
        return torch.cat([self.question(question)[:, None], x], 1)

    def forward(self, tokens: Tensor, places: Tensor, question: Tensor) -> Tensor:
        x = self.read(tokens, places, question)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    def attention(self, tokens: Tensor) -> Tensor:
        """(B, N): what the first layer's question gives to each token, mean over heads and the four questions."""
        block: Any = self.blocks[0]
        places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        total = torch.zeros(tokens.shape[:2])
        for quadrant in range(QUADRANTS):
            x = block.norm1(self.read(tokens, places, torch.full((len(tokens),), quadrant)))
            q, k, _ = block.attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            weights = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            total += weights[:, :, 0, 1:].mean(1)
        return total / QUADRANTS


Chooser = Callable[[Tensor, Reader, int, int], Tensor]  # tokens (B, N, 64), k, draw -> places (B, k)


def by_chance(tokens: Tensor, reader: Reader, count: int, draw: int) -> Tensor:
    rng = torch.Generator().manual_seed(draw)
    return torch.rand(tokens.shape[:2], generator=rng).argsort(1)[:, :count]


def by_norm(tokens: Tensor, reader: Reader, count: int, draw: int) -> Tensor:
    return tokens.norm(dim=-1).topk(count, 1).indices


def by_attention(tokens: Tensor, reader: Reader, count: int, draw: int) -> Tensor:
    return reader.attention(tokens).topk(count, 1).indices


def by_place(tokens: Tensor, reader: Reader, count: int, draw: int) -> Tensor:
    return torch.linspace(0, tokens.shape[1] - 1, count).round().long().expand(len(tokens), -1)


def by_difference(tokens: Tensor, reader: Reader, count: int, draw: int) -> Tensor:
    return select(tokens, count)


def by_own_attention(tokens: Tensor, count: int) -> Tensor:
    """Attention received under softmax(x x^T / sqrt d), for canvases that no reader was trained on."""
    weights = (tokens @ tokens.mT / tokens.shape[-1] ** 0.5).softmax(-1)
    return weights.mean(1).topk(count, 1).indices


CHOOSERS: dict[str, Chooser] = {
    "random": by_chance,
    "norm": by_norm,
    "attention": by_attention,
    "k-th": by_place,
    "divprune": by_difference,
}


def maps(context: Context, pixels: Tensor, net: nn.Module) -> Tensor:
    """uint8 pictures (n, 3, S, S) to the CNN's last map before its activation, (n, (S / 8)^2, 64)."""
    trunk: Any = net.trunk
    with torch.no_grad():
        return torch.cat([trunk(part.float() / 255).flatten(2).mT for part in pixels.split(200)])


def canvases(features: Tensor, labels: Tensor, count: int, rng: torch.Generator) -> dict[str, Tensor]:
    """`count` random canvases: tokens (n, 64, 64), a question (n,), and the class asked for (n,)."""
    rows = torch.randint(len(features), (count, QUADRANTS), generator=rng)
    question = torch.randint(QUADRANTS, (count,), generator=rng)
    answer = labels[rows.gather(1, question[:, None])[:, 0]]
    return {"tokens": features[rows].flatten(1, 2), "question": question, "label": answer}


def prepared(seed: int, context: Context) -> tuple[Reader, dict[str, Tensor], Tensor]:
    """The reader of this seed, test canvases of four pictures, and tokens of large canvases (300, 256, 64)."""
    pixels, labels = context.train_pixels(32, TRAINED)
    net = teacher(context, pixels, labels, TEACHER_STEPS)
    everywhere = torch.arange(QUADRANTS * CELLS)

    def make() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        reader, features = Reader(), maps(context, pixels, net)
        draws = torch.Generator().manual_seed(seed)

        def loss(batch: dict[str, Any], step: int, rng: torch.Generator) -> dict[str, Tensor]:
            places = everywhere.expand(len(batch["tokens"]), -1)
            found = reader(batch["tokens"], places, batch["question"])
            return {"cross_entropy": F.cross_entropy(found, batch["label"])}

        data = iter(lambda: canvases(features, labels, context.batch, draws), None)
        context.tell(f"reader of seed {seed}: {context.steps} steps")
        fit(reader, loss, data, context.steps, tell=context.tell)  # type: ignore[arg-type]
        return reader.state_dict()

    def look() -> dict[str, Tensor]:
        test_pixels, test_labels = context.test_pixels(32, 16 * LARGE_ITEMS)
        rows = test_pixels.unflatten(0, (LARGE_ITEMS, 4, 4)).permute(0, 3, 1, 4, 2, 5)
        squares = rows.flatten(4, 5).flatten(2, 3)  # 128 pixels a side
        return {"four": maps(context, test_pixels, net), "labels": test_labels, "large": maps(context, squares, net)}

    reader = Reader()
    reader.load_state_dict(shared(context, f"reader-{seed}", make))
    seen = shared(context, "maps", look)
    test = canvases(seen["four"], seen["labels"], TESTED, torch.Generator().manual_seed(100 + seed))
    return reader.requires_grad_(False).eval(), test, seen["large"]


def answered(seed: int, context: Context, *, name: str, draws: int = 1) -> Numbers:
    """Accuracy, in percent, from k tokens, and its mean over the k of the rule."""
    reader, test, _ = prepared(seed, context)
    found = {}
    for count in KEPT:
        right = 0.0
        for draw in range(draws):
            places = CHOOSERS[name](test["tokens"], reader, count, draw)
            logits = reader(take(test["tokens"], places), places, test["question"])
            right += float(logits.argmax(1).eq(test["label"]).double().mean())
        found[f"@{count}"] = 100 * right / draws
    return found | {"mean": sum(found[f"@{count}"] for count in RULED) / len(RULED)}


def everything(seed: int, context: Context) -> Numbers:
    """Accuracy from all 64 tokens."""
    reader, test, _ = prepared(seed, context)
    places = torch.arange(QUADRANTS * CELLS).expand(TESTED, -1)
    found = reader(test["tokens"], places, test["question"]).argmax(1).eq(test["label"])
    return {"mean": 100 * float(found.double().mean())}


def chosen_by_difference(seed: int, context: Context) -> Numbers:
    """The task, and on large canvases how often the chosen are farthest apart, and cover the others best."""
    found = dict(answered(seed, context, name="divprune"))
    reader, _, tokens = prepared(seed, context)
    apart = distances(tokens)
    chosen = {
        "divprune": select(tokens, SHARE),
        "random": by_chance(tokens, reader, SHARE, seed),
        "norm": by_norm(tokens, reader, SHARE, seed),
        "attention": by_own_attention(tokens, SHARE),
        "k-th": by_place(tokens, reader, SHARE, seed),
    }
    nearest, radius = {}, {}
    for name, places in chosen.items():
        rows = apart.gather(1, places[..., None].expand(-1, -1, LARGE))  # (n, k, N)
        between = rows.gather(2, places[:, None].expand(-1, SHARE, -1))
        nearest[name] = between.masked_fill(torch.eye(SHARE, dtype=torch.bool), torch.inf).amin((1, 2))
        radius[name] = rows.amin(1).amax(1)
    others = [name for name in chosen if name != "divprune"]
    farther = torch.stack([nearest["divprune"] > nearest[name] for name in others]).all(0)
    covers = torch.stack([radius["divprune"] < radius[name] for name in others]).all(0)
    return found | {"farther": 100 * float(farther.double().mean()), "covers": 100 * float(covers.double().mean())}


def over(arm: str) -> Quantity:
    """Points of accuracy over an arm, mean of the k of the rule."""
    return Quantity(("divprune", arm), lambda found: found["divprune"]["mean"] - found[arm]["mean"])


REPRODUCTION = Reproduction(
    slug="divprune",
    title="DivPrune: unlike tokens answer better",
    claim="visual tokens chosen to be unlike each other keep more of a model's answers than important or random ones, "
    "the more so the fewer are kept",
    source="arXiv:2503.02175, tables 1 to 3",
    checked="four CIFAR-10 pictures on a canvas, 64 tokens of a small CNN, a reader of two layers in place of a "
    "language model; 6 to 19 % of the tokens are kept. They are less redundant than LLaVA's 576. Distance and radius: "
    "300 canvases of 16 test pictures, 26 of 256 tokens kept, in percent of canvases on which DivPrune's smallest "
    "distance is larger, its covering radius smaller, than those of all four others",
    baseline="random",
    arms={
        "whole": Arm("all 64 tokens", everything, 2.5),
        "divprune": Arm("DivPrune", chosen_by_difference, 0.4),
        "random": Arm("by chance, 5 draws", partial(answered, name="random", draws=DRAWS), 0.4),
        "norm": Arm("the largest norms", partial(answered, name="norm"), 0.2),
        "attention": Arm("the most attention, mean of all questions", partial(answered, name="attention"), 0.2),
        "k-th": Arm("evenly spaced", partial(answered, name="k-th"), 0.2),
    },
    rule=(
        Condition("canvases on which the chosen are farthest apart, percent", of("divprune", "farther"), at_least=99.0),
        Condition("canvases that the chosen cover best, percent", of("divprune", "covers"), at_least=90.0),
        Condition("points over chance", over("random"), at_least=2.0),
        Condition("points over the largest norms", over("norm"), at_least=2.0),
        Condition("points over the most attention", over("attention"), at_least=2.0),
    ),
    steps=800,
    batch=64,
    report=("mean", *(f"@{count}" for count in KEPT), "farther", "covers"),
    memory="1.5 GB",
)
