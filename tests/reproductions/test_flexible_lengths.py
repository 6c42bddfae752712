"""The parts of FlexTok's and KARL's reproductions: what they measure, on models without training."""

import pytest
import torch

import vistok
from vistok.reproductions import flextok, karl


def pictures(count=4):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_halved_pictures_come_back_in_their_size():
    torch.manual_seed(0)
    tok = vistok.create("flextok-halved")
    assert tok.prepare(pictures()).shape == (4, 3, 16, 16)
    assert tok.decode(tok.encode(pictures())).shape == (4, 3, 32, 32)


def test_without_dropout_training_sees_all_tokens():
    rng = torch.Generator().manual_seed(0)
    assert vistok.create("flextok-whole").draw_lengths(3, rng).tolist() == [8, 8, 8]
    drawn = vistok.create("flextok-halved").draw_lengths(400, rng)
    assert (int(drawn.min()), int(drawn.max())) == (1, 8)


def test_errors_of_every_prefix_and_of_anothers_tokens():
    torch.manual_seed(0)
    tok = vistok.create("flextok-whole")
    with torch.no_grad():
        for parameter in tok.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    plain = flextok.errors(tok, pictures(), (1, 8), zeros=False)
    better = flextok.errors(tok, pictures(), (1, 8), zeros=True)
    assert set(plain) == {"mse@1", "mse@8", "mse@other"}
    assert better["mse@1"] <= plain["mse@1"]
    assert better["mse@8"] == pytest.approx(plain["mse@8"])
    assert plain["mse@other"] != plain["mse@8"]


def test_the_search_takes_the_first_prefix_that_reaches_the_error():
    errors = torch.tensor([[0.4, 0.2, 0.1], [0.4, 0.4, 0.3]])
    assert karl.shortest(errors, 0.2).tolist() == [2, 3]
    assert karl._at_mean_length(errors, 2.5) == pytest.approx(0.25)


def test_rank_correlation_with_ties():
    a = torch.tensor([1, 2, 2, 4])
    assert karl.spearman(a, a) == pytest.approx(1)
    assert karl.spearman(a, -a) == pytest.approx(-1)
    assert karl.spearman(a, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.9486833)
    assert karl.spearman(a, torch.ones(4)) == 0


def test_what_both_arms_of_karl_measure():
    torch.manual_seed(0)
    errors = karl.prefix_errors(vistok.create("karl-searched"), pictures())
    assert errors.shape == (4, 16)
    chosen = karl.bins_between(errors)
    assert len(set(chosen)) == 4
    assert chosen == sorted(chosen)
    kept, error = karl.asked(vistok.create("karl-adaptive"), pictures(), 0.1)
    assert kept.shape == error.shape == (4,)
    terms = vistok.create("karl-searched").loss({"pixels": pictures() / 255}, 0, torch.Generator().manual_seed(0))
    assert set(terms) == {"reconstruction"}
