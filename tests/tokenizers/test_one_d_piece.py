"""One-D-Piece: prefixes of every length, and the tail that training drops."""

from itertools import pairwise

import pytest
import torch

import vistok
from vistok.errors import InputError
from vistok.tokenizers.one_d_piece import OneDPiece


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(name="one-d-piece-tiny"):
    torch.manual_seed(0)
    model = vistok.create(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def test_every_prefix_decodes_and_costs_its_bits():
    model, pixels = make(), draw(2, 3, 32, 32)
    tokens = model.encode(pixels)
    assert list(model.spec.prefixes) == list(range(1, 13))
    pictures = []
    for length in model.spec.prefixes:
        prefix = tokens.prefix(length)
        assert prefix.bits().tolist() == [6 * length] * 2
        pictures.append(model.decode(prefix))
        assert pictures[-1].shape == pixels.shape
    assert all((a - b).abs().max() > 1e-5 for a, b in pairwise(pictures))
    with pytest.raises(InputError, match="prefix of 0"):
        tokens.prefix(0)


def test_the_rest_of_the_codes_has_no_say():
    model = make()
    tokens = model.encode(draw(2, 3, 32, 32))
    changed = tokens.codes.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 64
    other = vistok.Tokens(tokens.segments, codes=changed, canvas=tokens.canvas, source=tokens.source)
    assert torch.equal(model.decode(tokens.prefix(5)), model.decode(other.prefix(5)))
    assert not torch.equal(model.decode(tokens), model.decode(other))


def test_prefixes_of_tiles_keep_whole_rounds():
    model = make()
    tokens = model.encode(draw(1, 3, 32, 50), on_size="tile")
    assert tokens.length == 24
    assert model.decode(tokens.prefix(6)).shape == (1, 3, 32, 50)
    with pytest.raises(InputError, match="nearest"):
        model.decode(tokens.prefix(7))


def test_tail_drop_draws_every_length_alike_and_one_for_the_batch():
    model, rng = make(), torch.Generator().manual_seed(0)
    vectors = torch.arange(12.0)[None, :, None].expand(3, -1, 6)
    lengths = torch.zeros(13)
    for _ in range(2400):
        kept = model.shorten(vectors, rng)
        assert torch.equal(kept, vectors[:, : kept.shape[1]])
        lengths[kept.shape[1]] += 1
    assert lengths[0] == 0
    assert lengths[1:].min() > 140
    assert lengths[1:].max() < 260


@pytest.mark.parametrize("name", ["one-d-piece-tiny", "one-d-piece-tiny-proxy"])
def test_training_sees_the_shortened_sequence(name):
    model = make(name).train()
    codes = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"pixels": draw(2, 3, 32, 32), "proxy_codes": codes}

    def first_term(seed):
        terms = model.loss(batch, 0, torch.Generator().manual_seed(seed))
        return next(iter(terms.values())).item()

    values = [first_term(seed) for seed in range(8)]
    assert values == [first_term(seed) for seed in range(8)]
    assert len(set(values)) > 3


def test_quantizer_losses_see_all_tokens():
    model = make("one-d-piece-tiny-proxy").train()
    codes = torch.zeros(2, 16, dtype=torch.long)
    batch = {"pixels": draw(2, 3, 32, 32), "proxy_codes": codes}
    commitments = {model.loss(batch, 0, torch.Generator().manual_seed(seed))["commitment"].item() for seed in range(6)}
    assert len(commitments) == 1


def test_evaluation_never_drops():
    model, pixels = make(), draw(1, 3, 32, 32)
    model.train()
    tokens = model.encode(pixels)
    assert tokens.length == 12
    torch.testing.assert_close(model.decode(tokens), model(pixels).detach().clamp(0, 1))


def test_a_folder_keeps_its_kind(tmp_path):
    model = make()
    model.save(tmp_path / "model")
    again = vistok.load(tmp_path / "model")
    assert isinstance(again, OneDPiece)
    assert again.spec.prefix_rule == "any"
