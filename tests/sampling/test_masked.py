"""The masked sampler against the papers' loops written out item by item, and what holds for any of its options."""

import math
from dataclasses import replace

import pytest
import torch

from vistok.errors import InputError
from vistok.sampling.masked import MaskedSampling, SeededDraws, StoredDraws, gumbel, sample_masked

B, N, K = 3, 12, 7
MASK = K


def network(shape: tuple[int, ...], seed: int = 0):
    """Logits that depend on all codes, and on the condition."""
    weights = torch.randn(K + 1, K, generator=torch.Generator().manual_seed(seed))
    places = torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed + 1))

    def call(codes, guided):
        context = weights[codes].flatten(1, -2).mean(1)[(slice(None), *[None] * len(shape))]
        conditional = 2 * places + 3 * context + weights[codes]
        return torch.cat([conditional, conditional.roll(1, -1)]) if guided else conditional

    return call


def stored(steps: int, *shape: int, seed: int = 5) -> StoredDraws:
    rng = torch.Generator().manual_seed(seed)
    return StoredDraws(
        gumbel(torch.rand(steps, B, *shape, K, generator=rng)), gumbel(torch.rand(steps, B, *shape, generator=rng))
    )


def maskbit(net, draws, steps, scale, noise, power):
    """MaskBit's loop, one item and one code at a time."""
    ids = torch.full((B, N, 2), MASK)
    for i in range(steps):
        p = (i + 1) / steps
        w = scale * (1 - math.cos(math.pi * (i / steps) ** power)) / 2
        c, u = net(ids, True).chunk(2)
        log_p = (c + w * (c - u)).log_softmax(-1)
        after = ids.clone()
        for b in range(B):
            sure = {}
            for n in range(N):
                for m in range(2):
                    if ids[b, n, m] == MASK:
                        drawn = int((log_p[b, n, m] + draws.of_codes[i, b, n, m]).argmax())
                        after[b, n, m] = drawn
                        sure[n, m] = float(log_p[b, n, m, drawn] + noise * (1 - p) * draws.of_confidence[i, b, n, m])
            k = max(1, min(len(sure) - 1, math.floor(math.acos(p) / (math.pi / 2) * N * 2)))
            if i + 1 < steps:
                for place in sorted(sure, key=sure.get)[:k]:
                    after[(b, *place)] = MASK
        ids = after
    return ids


def test_maskbit_loop():
    draws, net = stored(6, N, 2), network((N, 2))
    sampling = MaskedSampling(
        guidance=1 + 3.0,
        steps=6,
        schedule="arccos",
        choice_temperature=4.5,
        guidance_curve="cosine",
        guidance_power=2.5,
    )
    ours = sample_masked(net, torch.full((B, N, 2), MASK), MASK, sampling, draws)
    assert torch.equal(ours, maskbit(net, draws, 6, 3.0, 4.5, 2.5))


def titok(net, draws, steps, scale, noise, soften):
    """TiTok's loop: noise on the logits at the confidence's own temperature, confidence = the raw logit."""
    ids, ratio = torch.full((B, N), MASK), 0.0
    for i in range(steps):
        w = ratio * scale
        ratio = (i + 1) / steps
        c, u = net(ids, True).chunk(2)
        logits = c + w * (c - u)
        logits = logits / (0.5 + 0.8 * (1 - ratio)) if soften else logits
        t = noise * (1 - ratio)
        drawn = (logits + t * draws.of_codes[i]).argmax(-1)
        drawn = torch.where(ids == MASK, drawn, ids)
        sure = logits.gather(-1, drawn[..., None])[..., 0] + t * draws.of_confidence[i]
        sure[ids != MASK] = math.inf
        k = max(1, min(int((ids[0] == MASK).sum()) - 1, math.floor(N * math.acos(ratio) / (math.pi / 2))))
        cut = sure.sort(1).values[:, k - 1]
        ids = drawn if i + 1 == steps else torch.where(sure <= cut[:, None], MASK, drawn)
    return ids


@pytest.mark.parametrize("soften", [False, True])
def test_titok_loop(soften):
    draws, net = stored(5, N), network((N,))
    sampling = MaskedSampling(
        guidance=1 + 4.5,
        steps=5,
        schedule="arccos",
        choice_temperature=2.0,
        draw_temperature=2.0,
        confidence="logit",
        guidance_curve="linear",
        temperature_annealing=soften,
        precision="float64",
    )
    ours = sample_masked(net, torch.full((B, N), MASK), MASK, sampling, draws)
    assert torch.equal(ours, titok(net, draws, 5, 4.5, 2.0, soften))


VARIANTS = [
    MaskedSampling(steps=1),
    MaskedSampling(steps=5, schedule="linear", choice_temperature=0.0),
    MaskedSampling(steps=4, bounded=False, rule="count", draw_temperature=6.0, draw_floor=1e-3, guidance=3.5),
    MaskedSampling(steps=6, granularity="token", guidance=2.0, guidance_curve="linear", guidance_after=True),
    MaskedSampling(steps=6, rounded=True, rule="count", draw_temperature=0.9, confidence="logit", temperature=0.0),
    MaskedSampling(steps=40, top_k=3, top_p=0.9),  # more steps than codes
]


@pytest.mark.parametrize("sampling", VARIANTS, ids=lambda sampling: f"{sampling.steps} steps")
@pytest.mark.parametrize("shape", [(N,), (N, 2)], ids=str)
def test_what_holds_for_all(sampling, shape):
    seen = []
    net = network(shape)

    def watched(codes, guided):
        seen.append(codes.clone())
        return net(codes, guided)

    codes = torch.full((B, *shape), MASK)
    codes[0, :3], codes[1, 5] = 2, 4
    made = sample_masked(watched, codes, MASK, sampling, SeededDraws([3, 4, 5]))
    assert made.shape == codes.shape
    assert bool(((made >= 0) & (made < K)).all())
    assert torch.equal(made[codes != MASK], codes[codes != MASK])  # the given are kept
    for before, after in zip(seen, [*seen[1:], made], strict=True):
        kept = before != MASK
        assert torch.equal(after[kept], before[kept])  # and so is what was once chosen
    alone = sample_masked(net, codes[1:2], MASK, sampling, SeededDraws([4]))
    assert torch.equal(alone[0], made[1])
    again = sample_masked(net, codes, MASK, sampling, SeededDraws([3, 4, 5]))
    assert torch.equal(again, made)


def test_counts_follow_the_schedule_of_each_items_own_unknown_codes():
    counts = []
    net = network((N,))

    def watched(codes, guided):
        counts.append((codes == MASK).sum(1).tolist())
        return net(codes, guided)

    codes = torch.full((2, N), MASK)
    codes[1, :8] = 0  # four unknown
    sample_masked(watched, codes, MASK, MaskedSampling(steps=4, schedule="linear"), SeededDraws([0, 1]))
    assert counts == [[12, 4], [9, 3], [6, 2], [3, 1]]


def test_tokens_of_several_codes_are_masked_together():
    def watched(codes, guided):
        masked = codes == MASK
        assert torch.equal(masked[..., 0], masked[..., 1])
        return network((N, 2))(codes, guided)

    sampling = MaskedSampling(steps=5, granularity="token")
    sample_masked(watched, torch.full((B, N, 2), MASK), MASK, sampling, SeededDraws([0, 1, 2]))


def test_the_surest_are_kept():
    places = torch.zeros(1, N, K)
    places[0, torch.arange(N), torch.arange(N) % K] = torch.arange(N).float()  # the later, the surer

    seen = []

    def watched(codes, guided):
        seen.append(codes.clone())
        return places

    sampling = MaskedSampling(steps=4, schedule="linear", choice_temperature=0.0, temperature=0.0)
    made = sample_masked(watched, torch.full((1, N), MASK), MASK, sampling, SeededDraws([0]))
    left = [(codes[0] == MASK).nonzero().flatten().tolist() for codes in seen[1:]]
    assert left == [list(range(9)), list(range(6)), list(range(3))]
    assert torch.equal(made, places.argmax(-1))


def test_both_ways_to_draw_have_the_same_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(1, 50_000, 4)
    sampling = MaskedSampling(steps=1, temperature=0.7)

    def share(draws):
        codes = sample_masked(lambda *_: logits, torch.full((1, 50_000), 4), 4, sampling, draws)
        return torch.bincount(codes[0], minlength=4) / 50_000

    noise = gumbel(torch.rand(1, 1, 50_000, 4, generator=torch.Generator().manual_seed(1)))
    expected = (logits[0, 0] / 0.7).softmax(-1)
    torch.testing.assert_close(share(SeededDraws([0])), expected, atol=8e-3, rtol=0)
    torch.testing.assert_close(share(StoredDraws(noise, noise[..., 0])), expected, atol=8e-3, rtol=0)


def test_no_second_branch_without_guidance():
    asked = []
    net = network((N,))

    def watched(codes, guided):
        asked.append(guided)
        return net(codes, guided)

    for guidance, curve in ((1.0, "linear"), (3.0, "linear"), (3.0, "constant")):
        sampling = MaskedSampling(steps=3, guidance=guidance, guidance_curve=curve)
        assert sampling.guided == (guidance != 1)
        sample_masked(watched, torch.full((1, N), MASK), MASK, sampling, SeededDraws([0]))
    assert asked == [False] * 3 + [False, True, True] + [True] * 3


def test_gumbel_numbers():
    drawn = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert abs(drawn.mean().item() - 0.5772) < 0.01
    assert abs(drawn.var().item() - math.pi**2 / 6) < 0.03
    assert torch.isfinite(gumbel(torch.tensor([0.0, 1.0]))).all()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"choice_temperature": -1.0}, "choice_temperature=-1"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"schedule": "cosinus"}, "schedule='cosinus'"),
        ({"guidance_curve": "none"}, "guidance_curve='none'"),
        ({"temperature": -0.1}, "temperature=-0.1"),
    ],
)
def test_values_out_of_range(wrong, word):
    with pytest.raises(InputError, match=word):
        replace(MaskedSampling(), **wrong)


def test_a_network_of_another_shape():
    with pytest.raises(InputError, match="logits"):
        sample_masked(
            lambda codes, guided: torch.zeros(B, N + 1, K),
            torch.full((B, N), MASK),
            MASK,
            MaskedSampling(),
            SeededDraws([0] * B),
        )
