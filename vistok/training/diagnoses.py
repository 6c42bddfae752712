"""The rules of the doctor: each looks at the chart of a stage and gives the findings of one kind.

A rule speaks only when several logged rows agree, so that noise raises nothing; the thresholds below say why they are
where they are. Losses are compared as logarithms (a fall by 2 % is a fall by 0.02 at any scale), except where a loss
is one already and goes below zero.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vistok.nn.query_vit import INIT_STD, INIT_WIDTH
from vistok.training.chart import Chart, Finding

Rule = Callable[[Chart], Iterable[Finding]]

AGREE = 3  # rows in a row that must show a disease: one or two happen by chance
SETTLED = 8  # rows before trends are judged: three at either end, and something between
DWARFED = 20.0  # a regulariser this many times all that measures the picture leaves it under 5 % of the loss
CONSTANT = 1e-6  # relative spread of float32 means that do not move at all
COLLAPSED = 0.05  # perplexity as a share of the codes: healthy codebooks lie above a fifth
FALLEN = 0.25  # of its best: a perplexity that has lost three quarters is on its way down
LOW = 0.12  # but only below an eighth of the codes: fresh VQGANs dip to a sixth of theirs and come back
WAKING = 1.1  # times what it was three rows ago: a young codebook that fills by itself
STUCK = 3e-3  # of its largest: latents this near to codes no longer move, whose commitment falls tenfold when sound
SPARSE = 0.25  # perplexity as a share of the codes, below which such latents are alike and not just well quantized
UNUSED = 0.6  # share of codes that never occur: young codebooks of sound runs leave up to half of theirs alone
PER_CODE = 8  # codes counted per code of the codebook before its use is judged: at equal use 0.03 % are unseen
EXPLODED = 30.0  # times the largest norm of the first half; norms of a sound run vary tenfold at most
VANISHED = 1e-4  # of the part's own first norms, or ..
NEGLIGIBLE = 1e-6  # .. of the largest part's: beneath what float32 adds up
ROSE = 0.2  # nats, a fifth: more than a sound loss regains from its beginning to its end
OSCILLATES = 1.0  # nats between rows, typically: windows of a sound run differ by 5 to 20 %, by half on few pictures
SPIKES = 1.5  # nats, fourfold: no sound run gets that much worse than it began; not for losses that are logarithms
PROGRESS = 0.02  # nats: a run from scratch gains more than 2 % in any ten rows of its beginning
DARK = 2 / 255  # highest pixel of pictures in [0, 1] that were stored as 8-bit numbers 0 and 1
WIDER = 1.3  # slope of output over pixels: least squares never exceed 1, a model that works in [-1, 1] has 2
FITS = 0.7  # correlation from which that slope means something
WORSE_DB, WORSE_LOSS = 0.3, 0.02  # a held-out PSNR or loss that is worse by this is worse on every picture set
ACCURATE = 0.98  # of a discriminator's verdicts are right: what it sees of the decoder no longer matters to it
SURE = 1.0  # mean logits beyond this on both sides: the hinge's margin, behind which it learns nothing more

# terms that shape codes or please a discriminator; all others measure the picture (or the tokens, of a generator)
REGULARISERS = ("commit", "codebook", "entropy", "kl", "prior", "disentangle", "orthogonal", "sparsity", "lecam")
ADVERSARIAL = ("adversarial", "discriminator", "lecam", "gan")


def pixel_range(chart: Chart) -> Iterator[Finding]:
    """Pixels that are not in [0, 1]: one row is enough."""
    lows, highs = chart.series("pixel_low"), chart.series("pixel_high")
    if not len(lows):
        return
    low, high = float(lows.min()), float(highs.max())
    evidence = {"pixel_low": low, "pixel_high": high}
    told = f"pixels span {low:.3g} to {high:.3g} {chart.span(len(lows))}, [0, 1] is meant"
    if high > 4:  # beyond what normalising by mean and deviation gives
        cure = "divide the pictures by 255 where they are read: they are in 0..255"
    elif low < -0.01 and low >= -1.01 and high <= 1.01:
        cure = "give (pixels + 1) / 2 where they are read: they are in [-1, 1], and models shift to their own range"
    elif low < -0.01 or high > 1.01:
        cure = "leave the pictures unnormalised where they are read: models shift to their own range"
    elif high <= DARK and len(lows) >= AGREE:
        cure = "multiply the pictures by 255 before they are stored as 8-bit numbers: all are black"
    else:
        return
    yield Finding("pixel-range", "", told, f"{cure} (--data)", None, evidence)


def output_range(chart: Chart) -> Iterator[Finding]:
    """A decoder that gives the picture in another range than [0, 1]."""
    slope, fit = chart.series("output_slope")[-AGREE:], chart.series("output_fit")[-AGREE:]
    if len(slope) < AGREE or fit.min() < FITS or slope.min() < WIDER:
        return
    offset, outside = chart.series("output_offset")[-1], chart.series("output_outside")[-1]
    low, high = chart.series("output_low")[-1], chart.series("output_high")[-1]
    yield Finding(
        "output-range",
        "decoder",
        f"the decoder gives {slope[-1]:.2f} * pixels {offset:+.2f}, from {low:.3g} to {high:.3g}, with "
        f"{outside:.0%} outside [0, 1] {chart.span(AGREE)}; decode clamps that away",
        "bring the decoder's output to [0, 1] in the model, such as (x + 1) / 2, and compare it with the pixels there",
        None,
        {"slope": slope.tolist(), "offset": float(offset), "correlation": fit.tolist(), "outside": float(outside)},
    )


def dead_terms(chart: Chart) -> Iterator[Finding]:
    """Terms that are zero, constant, or cut off from the weights."""
    for name in chart.names("term"):
        values = chart.series(f"term/{name}")
        if chart.recipe.loss.get(name) == 0 or len(values) < SETTLED:
            continue
        waits = _is(name, ADVERSARIAL) and not values.any()  # for its start step
        detached = chart.series(f"detached/{name}")[-AGREE:]
        recent = values[-SETTLED:]
        spread = float(recent.max() - recent.min())
        if not values.any() and not waits:
            told = f"the term {name} is 0 in all {len(values)} rows up to step {int(chart.rows[-1]['step'])}"
        elif len(detached) == AGREE and detached.all() and not waits:
            told = f"no gradient flows from the term {name} ({values[-1]:.4g}) {chart.span(AGREE)}"
        elif values.any() and spread <= CONSTANT * abs(float(np.median(recent))):
            told = f"the term {name} stays at {values[-1]:.6g} {chart.span(SETTLED)}"
        else:
            continue
        cure = "mend it in the model's loss (a detach, an argmax or a constant in it), or say that it is not wanted"
        yield Finding("dead-term", name, told, cure, f"loss.{name}=0", {"values": recent.tolist()})


def dwarfing_terms(chart: Chart) -> Iterator[Finding]:
    """A regulariser beside which the picture no longer counts."""
    judged = _judged(chart)
    if len(judged) < SETTLED:
        return
    for name in chart.names("term"):
        values = np.abs(chart.series(f"term/{name}"))
        if not _is(name, REGULARISERS + ADVERSARIAL) or len(values) != len(judged):
            continue
        ratio = values[-AGREE:] / np.maximum(np.abs(judged[-AGREE:]), 1e-12)
        if ratio.min() > DWARFED:
            weight = chart.recipe.loss.get(name, 1.0) / float(np.median(ratio))
            yield Finding(
                "dwarfing-term",
                name,
                f"the term {name} ({values[-1]:.3g}) is {np.median(ratio):.0f} times all terms that measure the "
                f"picture ({judged[-1]:.3g}) {chart.span(AGREE)}",
                "weigh it less",
                f"loss.{name}={weight:.1g}",
                {"ratio": ratio.tolist()},
            )


def codebooks(chart: Chart) -> Iterator[Finding]:
    """Codebook collapse, and codes that nothing chooses."""
    for name in chart.names("perplexity"):
        columns = [chart.series(f"{column}/{name}") for column in ("size", "seen", "used", "perplexity")]
        size, seen, used, perplexity = (column[-SETTLED * AGREE :] for column in columns)
        reachable = np.minimum(size, seen / PER_CODE)
        if len(size) < AGREE or _early(chart) or reachable[-1] < 2:
            continue
        share = (perplexity - 1) / np.maximum(reachable - 1, 1)
        everything = perplexity / reachable
        before = perplexity[-2 * AGREE : -AGREE]
        waking = len(before) == AGREE and perplexity[-AGREE:].mean() > WAKING * before.mean()
        tiny = bool((share[-AGREE:] < COLLAPSED).all()) and not waking
        sinking = everything[-SETTLED:].max() < min(LOW, FALLEN * float(everything.max()))
        commitment = chart.series("term/commitment")
        alike = (
            len(commitment) >= SETTLED
            and commitment[-AGREE:].max() < STUCK * commitment.max()
            and bool((everything[-AGREE:] < SPARSE).all())
        )
        override, cure = _codebook_cure(chart)
        evidence = {"perplexity": perplexity[-AGREE:].tolist(), "codes": float(size[-1]), "used": float(used[-1])}
        if tiny or sinking:
            fall = "" if tiny else f", from {perplexity.max():.4g}"
            yield Finding(
                "codebook-collapse",
                name,
                f"{name} uses its {size[-1]:.0f} codes as if they were {perplexity[-1]:.3g} (perplexity{fall}) "
                f"{chart.span(AGREE)}; {used[-1]:.1%} of them occur",
                cure,
                override,
                evidence,
            )
            continue
        if alike:
            yield Finding(
                "codebook-collapse",
                name,
                f"latents lie on their codes (commitment {commitment[-1]:.2g}, from {commitment.max():.2g}) while "
                f"{name} uses {size[-1]:.0f} as if they were {perplexity[-1]:.3g} {chart.span(AGREE)}: they are alike "
                "for all pictures, and codes that are restarted only hide it",
                cure,
                override,
                evidence | {"commitment": commitment[-AGREE:].tolist()},
            )
            continue
        counted = used[seen >= PER_CODE * size]
        if len(counted) and counted[-1] < 1 - UNUSED:
            yield Finding(
                "dead-codes",
                name,
                f"{1 - counted[-1]:.0%} of the {size[-1]:.0f} codes of {name} never occur {chart.span(1)}",
                cure,
                override,
                evidence | {"used": counted[-AGREE:].tolist()},
            )


def discriminator(chart: Chart) -> Iterator[Finding]:
    """A discriminator that is always right and sure of it, from which the decoder learns nothing more."""
    for role, prefix in (("adversary", ""), ("clip_adversary", "clip_")):
        columns = (f"{prefix}discriminator_accuracy", f"{prefix}logits_real", f"{prefix}logits_fake")
        right, real, fake = (chart.series(column)[-SETTLED:] for column in columns)
        section = getattr(chart.recipe, role, None)
        if section is None or min(map(len, (right, real, fake))) < SETTLED:
            continue
        if right.min() < ACCURATE or real.min() < SURE or fake.max() > -SURE:
            continue
        rate = chart.recipe.adversary_optimizer(section).lr
        yield Finding(
            "discriminator-won",
            f"{prefix}discriminator",
            f"the {prefix}discriminator is right in {right.mean():.1%} of its verdicts {chart.span(SETTLED)}, with "
            f"logits of {real[-1]:+.2f} on pictures and {fake[-1]:+.2f} on reconstructions, at a rate of {rate:.2g}",
            "slow it down, or let the decoder go ahead of it (a later start)",
            f"{role}.optimizer.lr={rate / 10:.1g}",
            {"accuracy": right.tolist(), "logits_real": real.tolist(), "logits_fake": fake.tolist()},
        )


def gradients(chart: Chart) -> Iterator[Finding]:
    """Gradients that explode, vanish, or never arrive."""
    total = chart.series("grad_norm")
    if len(total) >= SETTLED:
        last, before = float(np.median(total[-AGREE:])), float(total[: len(total) // 2].max())
        if last > EXPLODED * before > 0:
            clip = chart.recipe.optimizer.clip
            yield Finding(
                "exploding-gradient",
                "",
                f"the gradient's norm is {last:.3g} {chart.span(AGREE)}, it was at most {before:.3g} in the first half",
                "clip it" if clip is None else "lower the learning rate",
                "optimizer.clip=1.0" if clip is None else _lower_rate(chart),
                {"grad_norm": total[-AGREE:].tolist(), "before": before},
            )
    parts = {name: chart.series(f"grad/{name}") for name in chart.names("grad")}
    largest = max((float(values[-AGREE:].max()) for values in parts.values()), default=0.0)
    for name, values in parts.items():
        if len(values) < SETTLED or _is(name, ADVERSARIAL) or _early(chart):
            continue  # a discriminator has none before it starts, and none once it has won
        last = float(values[-AGREE:].max())
        fell = last < VANISHED * float(np.median(values[:AGREE])) and _gained(chart) < np.log(10)
        if last == 0:
            told = f"no gradient reaches the {name} {chart.span(AGREE)}, though it is meant to train"
        elif fell or last < min(NEGLIGIBLE * largest, 0.1 * float(np.median(values[:AGREE]))):
            told = (
                f"the gradient of the {name} has vanished: {last:.2g} {chart.span(AGREE)}, {values[0]:.2g} at first, "
                f"{largest:.2g} in the largest part"
            )
        else:
            continue
        half = chart.recipe.train.precision != "fp32"
        cure = "look for a detach or a saturated activation on its way to the loss; a smaller rate keeps weights there"
        yield Finding(
            "vanishing-gradient",
            name,
            told,
            "rule out the precision first, then " + cure if half else cure,
            "train.precision=fp32" if half else _lower_rate(chart),
            {"grad_norm": values[-AGREE:].tolist(), "first": values[:AGREE].tolist(), "largest": largest},
        )


def learning_rate(chart: Chart) -> Iterator[Finding]:
    """A loss that rises, falls back or swings: steps too large for the landscape."""
    judged = _nats(_judged(chart))
    if len(judged) < SETTLED:
        return
    smooth, noise = _smooth(judged), _noise(judged)
    first, last, best = float(np.median(_beginning(judged))), float(np.median(judged[-AGREE:])), float(smooth.min())
    shown, name = _judged(chart), _judged_name(chart)
    if last - first > max(ROSE, 4 * noise):
        told = f"{name} has risen from {np.median(_beginning(shown)):.4g} to {np.median(shown[-AGREE:]):.4g}"
    elif last - best > max(ROSE, 0.5 * (first - best), 6 * noise):
        told = f"{name} had fallen to {shown.min():.4g} and is back at {np.median(shown[-AGREE:]):.4g}"
    elif shown.min() > 0 and smooth.max() - judged[:AGREE].max() > SPIKES:
        told = f"{name} began at {shown[0]:.4g} and has been as high as {shown.max():.4g}"
    elif float(np.median(np.abs(np.diff(judged[-SETTLED:])))) > OSCILLATES:
        told = f"{name} swings between {shown[-SETTLED:].min():.4g} and {shown[-SETTLED:].max():.4g}"
    else:
        return
    rate = chart.series("lr")
    at = f" at a learning rate of up to {rate.max():.2g}" if len(rate) else ""
    yield Finding(
        "learning-rate",
        "",
        f"{told} {chart.span(len(shown))}{at}",
        "lower the learning rate",
        _lower_rate(chart),
        {"first": first, "best": best, "last": last, "noise": noise},
    )


def stalled(chart: Chart) -> Iterator[Finding]:
    """A run from scratch that learns nothing."""
    judged = _nats(_judged(chart))
    if not chart.fresh or chart.recipe.model.init is not None or len(judged) < SETTLED + 2:
        return  # a trained model has little left to gain, and is no worse for it
    if _fitted(chart):
        return  # so has one that is fitted to data before its first step
    if _early(chart) or chart.steps < 2 * chart.recipe.optimizer.warmup:
        return
    gained = _gained(chart)
    moved = float(np.median(judged[:AGREE]) - np.median(judged[-AGREE:]))
    if gained > PROGRESS + 2 * _noise(judged) or moved > PROGRESS or moved < -ROSE:
        return
    rate = chart.recipe.optimizer.lr
    shown = _judged(chart)
    yield Finding(
        "stalled",
        "",
        f"{_judged_name(chart)} was {np.median(shown[:AGREE]):.4g} and is {np.median(shown[-AGREE:]):.4g} after "
        f"{chart.steps} steps at a learning rate of up to {rate:.2g}",
        "raise the learning rate" if rate < 1e-3 else "lower the learning rate: the first steps may have done harm",
        f"optimizer.lr={max(10 * rate, 1e-4):.1g}" if rate < 1e-3 else _lower_rate(chart),
        {"first": float(shown[0]), "last": float(shown[-1]), "gained": gained},
    )


def overfitting(chart: Chart) -> Iterator[Finding]:
    """Held-out pictures get worse while those that are trained on get better."""
    rows = [row for row in chart.validation if "psnr" in row or "loss" in row]
    if len(rows) < AGREE or len(_judged(chart)) < AGREE:
        return
    column, sign, margin = ("psnr", -1.0, WORSE_DB) if "psnr" in rows[0] else ("loss", 1.0, WORSE_LOSS)
    values = sign * np.array([row[column] for row in rows])  # lower is better
    best = int(values.argmin())
    if len(values) - best < AGREE or values[best + 1 :][-2:].min() - values[best] < margin:
        return
    since = [row for row in chart.rows if row["step"] >= rows[best]["step"]]
    judged = _nats(_judged(Chart(chart.recipe, rows=since)))
    if len(judged) < 2 or judged[-1] >= judged[0]:
        return  # training got worse too: another disease
    step = int(rows[best]["step"])
    unit = " dB" if column == "psnr" else ""
    data = chart.recipe.data
    cure, override = "stop where it was best", f"train.steps={step}"
    if not data.flip or data.scale is None:
        override = "data.flip=true" if not data.flip else "data.scale=[0.5,1.0]"
        cure = f"train on more pictures, vary them more, or stop at step {step}"
    yield Finding(
        "overfitting",
        "",
        f"{column} on held-out pictures was {abs(values[best]):.4g}{unit} at step {step} and is "
        f"{abs(values[-1]):.4g}{unit} at step {int(rows[-1]['step'])}, while the training loss went on falling",
        cure,
        override,
        {column: [row[column] for row in rows]},
    )


RULES: tuple[Rule, ...] = (
    pixel_range,
    output_range,
    learning_rate,
    dwarfing_terms,
    dead_terms,
    codebooks,
    discriminator,
    gradients,
    stalled,
    overfitting,
)


# -- what the rules share --------------------------------------------------------------------------------------------


def _is(name: str, kinds: tuple[str, ...]) -> bool:
    return any(kind in name.lower() for kind in kinds)


def _measures(chart: Chart) -> list[str]:
    names = chart.names("term")
    return [name for name in names if not _is(name, REGULARISERS + ADVERSARIAL)] or names


def _judged(chart: Chart) -> np.ndarray:
    """The sum of the terms that measure the picture, per row: what learning is to bring down."""
    columns = [f"term/{name}" for name in _measures(chart)]
    rows = [row for row in chart.rows if all(column in row for column in columns)]
    return np.array([sum(row[column] for column in columns) for row in rows]) if columns else chart.series("loss")


def _judged_name(chart: Chart) -> str:
    names = _measures(chart)
    return f"the loss ({' + '.join(names)})" if 0 < len(names) < len(chart.names("term")) else "the loss"


def _nats(values: np.ndarray) -> np.ndarray:
    return np.log(values) if len(values) and values.min() > 0 else values


def _beginning(values: np.ndarray) -> np.ndarray:
    """The first quarter: the very first rows are too good where codebooks were fitted to their pictures."""
    return values[: max(AGREE, len(values) // 4)]


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    return np.median(np.lib.stride_tricks.sliding_window_view(values, min(width, len(values))), axis=-1)


def _noise(values: np.ndarray) -> float:
    """Standard deviation of a row around the trend, from the steps between rows."""
    return float(np.sqrt(np.square(np.diff(values)).mean() / 2))


def _gained(chart: Chart) -> float:
    """Nats between the loss at first and at its best."""
    judged = _nats(_judged(chart))
    return float(np.median(judged[:AGREE]) - _smooth(judged).min()) if len(judged) >= AGREE else 0.0


def _early(chart: Chart) -> bool:
    """Whether warm-up, or the first tenth of a short stage, still explains what is seen."""
    train, optimizer = chart.recipe.train, chart.recipe.optimizer
    return chart.steps < min(max(optimizer.warmup, 100), train.steps // 2)


def _lower_rate(chart: Chart) -> str:
    return f"optimizer.lr={chart.recipe.optimizer.lr / 10:.1g}"


def _codebook_cure(chart: Chart) -> tuple[str, str]:
    """The override that helps this model's codebook most, and what it does."""
    for name, weight in chart.recipe.loss.items():
        if "commit" in name and weight > 1:
            return f"loss.{name}=1.0", "let the encoder move: its commitment holds it where the codebook is"
    fields = _config_fields(chart)
    if fields.get("restart_below") == 0:
        return "model.restart_below=1.0", "let codes that die start again from latents of the batch"
    encoder = fields.get("encoder")
    width = encoder.get("width", INIT_WIDTH) if isinstance(encoder, dict) else INIT_WIDTH
    if fields.get("init_std") == INIT_STD and width < INIT_WIDTH:
        cure = "begin with weights as much wider as the model is narrower, so that codes tell pictures apart"
        return f"model.init_std={INIT_STD * (INIT_WIDTH / width) ** 0.5:.2g}", cure
    for name in ("entropy", "entropy_weight"):
        if fields.get(name) == 0:
            return f"model.{name}=0.05", "reward equal use of the codes"
    if fields.get("codebook") in ("legacy", "plain"):
        return "model.codebook=cosine", "compare directions instead of distances"
    return _lower_rate(chart), "lower the learning rate, so that the encoder does not outrun the codebook"


def _fitted(chart: Chart) -> bool:
    """Whether the model begins with codebooks or a prior that were fitted to data."""
    from vistok.errors import VistokError
    from vistok.registry import system_of

    try:
        return hasattr(system_of(str(chart.recipe.model.name))[0].model, "initialise")
    except VistokError:
        return False


def _config_fields(chart: Chart) -> dict:
    """What the recipe can set in the model's config, with its values; nothing where weights bring their own."""
    from dataclasses import asdict

    from vistok.errors import VistokError
    from vistok.registry import system_of

    if chart.recipe.model.name is None:
        return {}
    try:
        return asdict(system_of(chart.recipe.model.name)[1]) | chart.recipe.model.changes
    except VistokError:  # a system that was registered where the run was trained
        return {}
