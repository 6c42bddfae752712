"""KARL: how many tokens are kept, mixed lengths in one batch, what training does in its two calls, and its stages."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vistok
from vistok.errors import ConfigError, InputError
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.by_length import ByLength
from vistok.tokenizers._karl_network import BINS
from vistok.tokenizers.karl import VARIANTS, halting_terms

TINY = [name for name in VARIANTS if "tiny" in name.split("-")]


def pixels(count=4, seed=0):
    """Pictures from nearly flat to noise."""
    drawn = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.linspace(0.1, 1, count)[:, None, None, None]


def undecided(name="karl-tiny", **changes):
    """A fresh model whose halting head says something else of every token and picture."""
    torch.manual_seed(0)
    model = vistok.create(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.encoder.conditions.normal_()
        model.encoder.queries.normal_()
        seen = pixels(6)
        middle = model.encoder(seen, model.base.latent(seen), torch.full((6,), 0.05), 16).halting.median()
        model.encoder.halting[2].bias += torch.tensor(model.config.threshold).logit() - middle
    return model


def halted(tokens):
    """The tokens with others kept: ever more of them."""
    drawn = torch.rand(tokens.keep.shape, generator=torch.Generator().manual_seed(1))
    return replace(tokens, keep=drawn < torch.linspace(0, 1, len(tokens))[:, None])


@pytest.mark.parametrize("name", TINY)
def test_every_kind_encodes_and_decodes(name):
    tok = undecided(name)
    tokens = tok.encode(pixels())
    assert tokens.keep.shape == (4, 16)
    assert torch.equal(tokens.lengths, tokens.keep.sum(1))
    assert tok.decode(tokens).shape == (4, 3, 32, 32)
    again = vistok.Tokens.from_bytes(tokens.to_bytes())
    assert torch.equal(tok.decode(again), tok.decode(tokens))


def test_pictures_of_different_lengths_decode_together_as_alone():
    tok = undecided()
    tokens = halted(tok.encode(pixels(6)))
    assert len(set(tokens.lengths.tolist())) > 3
    together = tok.decode(tokens)
    for row in range(6):
        torch.testing.assert_close(tok.decode(tokens[row])[0], together[row], atol=2e-4, rtol=0)


def test_a_halted_token_sees_itself_alone_and_is_seen_by_none():
    """Left out, as the decoder does it, gives what the authors' mask gives."""
    tok = undecided()
    decoder, tokens = tok.decoder, halted(tok.encode(pixels(5)))
    vectors = tok.quantizer.decode(tokens.codes)
    grid = tok.config.cells[0] * tok.config.cells[1]
    there = F.pad(tokens.keep, (grid, 0), value=True)
    mask = (there[:, :, None] & there[:, None]) | torch.eye(grid + 16, dtype=torch.bool)
    with torch.no_grad():
        rest = decoder.embed(vectors) + decoder.places
        cells = (
            decoder.mask_token
            + torch.nn.functional.interpolate(decoder.positions[None], size=tok.config.cells, mode="nearest")[0]
            .flatten(1)
            .T
        )
        x = decoder.norm_in(torch.cat([cells.expand(5, -1, -1), rest], 1))
        for block in decoder.blocks:
            x = block(x, mask=mask[:, None])
        expected = decoder.predict(decoder.norm_out(x[:, :grid]))
        torch.testing.assert_close(decoder(vectors, tokens.keep), expected, atol=1e-4, rtol=1e-4)


def test_what_is_halted_does_not_matter():
    tok = undecided()
    tokens = halted(tok.encode(pixels()))
    for elsewhere in ((tokens.codes + 7) % 256, torch.full_like(tokens.codes, -1)):
        other = replace(tokens, codes=torch.where(tokens.keep, tokens.codes, elsewhere))
        torch.testing.assert_close(tok.decode(other), tok.decode(tokens))
        assert torch.equal(tok.embed(other)[tokens.keep], tok.embed(tokens)[tokens.keep])


def test_compressed_files_hold_the_mask_and_what_is_kept():
    from vistok import compressed

    tok = undecided()
    for row in range(3):
        tokens = halted(tok.encode(pixels(3)))[row]
        again = compressed.unpack(tok, compressed.pack(tok, tokens))
        assert torch.equal(again.keep, tokens.keep)
        torch.testing.assert_close(tok.decode(again), tok.decode(tokens))


def test_all_or_nothing_kept():
    tok = undecided()
    tokens = tok.encode(pixels(2))
    for keep in (torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)):
        assert tok.decode(replace(tokens, keep=keep)).shape == (2, 3, 32, 32)
    whole = replace(tokens, keep=torch.ones(2, 16, dtype=torch.bool))
    torch.testing.assert_close(tok.decode(whole), tok.decode(replace(tokens, keep=None)))


def test_quality_is_one_number_or_one_for_each():
    tok = undecided()
    each = tok.encode(pixels(3), quality=[0.02, 0.05, 0.3])
    for row, quality in enumerate((0.02, 0.05, 0.3)):
        alone = tok.encode(pixels(3)[row : row + 1], quality=quality)
        assert torch.equal(alone.codes[alone.keep], each[row].codes[each[row].keep])
        assert torch.equal(alone.keep, each[row].keep)
    assert not torch.equal(tok.encode(pixels(3), quality=0.3).codes, tok.encode(pixels(3), quality=0.01).codes)


def test_the_bin_is_the_smallest_that_is_not_below():
    tok = undecided("karl-tiny-continuous")

    def vectors(quality):
        return tok.encode(pixels(1), quality=quality).vectors

    for wanted, bin_ in ((0.0, 0.005), (0.05, 0.05), (0.051, 0.06), (0.9, 0.38)):
        assert torch.equal(vectors(wanted), vectors(bin_))
    assert not torch.equal(vectors(0.05), vectors(0.051))


def test_a_budget_limits_the_tokens():
    tok = undecided()
    tokens = tok.encode(pixels(2), budget=5)
    assert tokens.codes.shape == (2, 16)
    assert not tokens.keep[:, 5:].any()
    for budget in (0, 17, 2.5):
        with pytest.raises(InputError, match="budget"):
            tok.encode(pixels(2), budget=budget)


def test_illegal_qualities_are_refused():
    tok = undecided()
    for quality in (-0.1, float("nan"), float("inf"), [0.1, 0.2, 0.3]):
        with pytest.raises(InputError, match="quality"):
            tok.encode(pixels(2), quality=quality)


def test_tiles_and_lists_pass_quality_on():
    tok = undecided()
    large = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(3))
    tokens = tok.encode(large, quality=[0.02, 0.3], on_size="tile")
    assert tokens.keep.shape == (2, 32)
    assert tok.decode(tokens).shape == (2, 3, 64, 32)
    assert torch.equal(tok.encode(large[1:], quality=0.3, on_size="tile").codes, tokens.codes[1:])


def test_impossible_configs_are_refused():
    tiny = VARIANTS["karl-tiny"]
    for changes in ({"patch": 8}, {"image_size": 30}, {"tokens": 17}, {"budgets": (2, 17)}, {"budgets": ()}):
        with pytest.raises(ConfigError):
            replace(tiny, **changes)


# -- training --------------------------------------------------------------------------------------------------------


def frozen_base(tok):
    tok.train()
    tok.base.requires_grad_(False)
    tok.base.eval()
    return tok


def test_training_learns_and_halting_follows_the_surplus():
    torch.manual_seed(0)
    tok = frozen_base(vistok.create("karl-tiny-pixels"))
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(tok.parameters(), 2e-3)
    losses = []
    for step in range(40):
        terms = tok.loss({"pixels": pixels(8)}, step, rng)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(float(terms["reconstruction_estimate"].detach()))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {"active_estimate", "active_halting", "reconstruction_halting"} <= set(terms)


def test_gradients_reach_every_part_but_the_frozen_base():
    tok = frozen_base(undecided())
    rng = torch.Generator().manual_seed(1)
    total = sum(sum(tok.loss({"pixels": pixels()}, step, rng).values()) for step in range(3))
    total.backward()
    for name, parameter in tok.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("base.")), name


def test_the_second_call_wants_what_the_first_reached():
    tok = frozen_base(undecided())
    batch: dict = {}
    wanted = torch.full((4,), 0.01)
    with torch.no_grad():
        terms = tok.two_calls(batch, pixels(), 6, wanted)
        latent = tok.encoder(pixels(), tok.base.latent(pixels()), wanted, 6)
        image = tok.reconstruct(tok.quantizer(latent.tokens).vectors)
    torch.testing.assert_close(batch["wanted"], (image - pixels()).abs().flatten(1).mean(1))
    assert "halt_halting" in terms
    assert "halt_estimate" not in terms
    with torch.no_grad():
        assert "halt_halting" not in tok.two_calls({}, pixels(), 16, wanted)


def test_halting_terms():
    logits = torch.tensor([[-30.0, -30.0, 30.0]])
    assert all(float(term) < 1e-6 for term in halting_terms(logits, 1).values())
    assert float(halting_terms(logits, 2)["halt"]) == pytest.approx(15, abs=0.01)
    assert set(halting_terms(logits, 0)) == {"active"}


def test_wanted_errors_that_are_reached_are_drawn_more_rarely():
    tok = frozen_base(undecided())
    before = tok.probabilities.clone()
    assert before.sum() == pytest.approx(1)
    assert (before > 0).tolist() == [value <= 0.04 for value in BINS]
    tok._decay(torch.tensor(0.02))
    assert tok.probabilities.sum() == pytest.approx(1)
    assert tok.probabilities[0] > before[0]
    assert tok.probabilities[3] < before[3]
    evaluated = tok.probabilities.clone()
    tok.eval()
    tok.loss({"pixels": pixels()}, 0, torch.Generator().manual_seed(0))
    assert torch.equal(tok.probabilities, evaluated)


def test_stages_learn_what_is_not_frozen():
    tok = undecided().train()
    rng = torch.Generator().manual_seed(0)
    tok.encoder.requires_grad_(False)
    tok.decoder.requires_grad_(False)
    assert "reconstruction" in tok.loss({"pixels": pixels()}, 0, rng)
    tok.requires_grad_(True)
    adversary = AdversarialLoss(ByLength(span=2, width=8, layers=1))
    tok.judge(adversary, lambda a, b: (a - b).square().flatten(1).mean(1))
    batch = {"pixels": pixels()}
    terms = tok.loss(batch, 0, rng)
    stage2 = {"reconstruction", "perceptual", "adversarial", "active", "commitment", "codebook"}
    assert {f"{name}_{call}" for name in stage2 for call in ("estimate", "halting")} <= set(terms)
    tok.discriminator_loss(batch, 0).backward()
    judged = {
        index for index, each in enumerate(adversary.discriminator.each) if next(each.parameters()).grad is not None
    }
    assert judged == {max(0, min(8, kept // 2) - 1) for kept, _ in batch["reconstructions"]}
