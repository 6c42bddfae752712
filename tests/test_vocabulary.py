"""One vocabulary for any layout: there and back, masks, text's room, and what does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.errors import ConfigError, InputError, MismatchError
from vistok.layout import Segment
from vistok.tokens import Tokens
from vistok.vocabulary import PlaceMask, Vocabulary

TWO = (Segment("holistic", (3,), (10,)), Segment("grid", (2, 2), (8, 5)))


def drawn(segments, items=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    widest = max(len(segment.codebooks) for segment in segments)
    parts = []
    for segment in segments:
        part = torch.full((items, segment.count, widest), -1)
        for column, size in enumerate(segment.codebooks):
            part[..., column] = torch.randint(0, size, (items, segment.count), generator=rng)
        parts.append(part)
    codes = torch.cat(parts, 1)
    return codes[..., 0] if widest == 1 else codes


def test_every_codebook_has_ids_of_its_own():
    vocabulary = Vocabulary(TWO, text=100, extras={"class": 7, "begin": 1})
    assert (vocabulary.size, vocabulary.length) == (100 + 10 + 8 + 5 + 7 + 1, 3 + 4 * 2)
    assert vocabulary.ranges()[:5] == [(100, 110)] * 3 + [(110, 118), (118, 123)]
    assert vocabulary.ids_of("class") == range(123, 130)
    assert vocabulary.ids_of("text") == range(100)
    with pytest.raises(InputError, match="did you mean 'class'"):
        vocabulary.ids_of("clas")
    codes = drawn(TWO)
    ids = vocabulary.ids(codes)
    assert ids.shape == (2, 11)
    assert int(ids[0, 3]) == 110 + int(codes[0, 3, 0])
    assert torch.equal(vocabulary.codes(ids), codes)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(2, 9), min_size=1, max_size=3)), min_size=1, max_size=3),
    st.integers(0, 20),
    st.booleans(),
)
def test_there_and_back_for_any_layout(parts, text, share):
    segments = tuple(Segment(f"s{i}", (count,), tuple(books)) for i, (count, books) in enumerate(parts))
    vocabulary, codes = Vocabulary(segments, text=text, share=share), drawn(segments)
    ids = vocabulary.ids(codes)
    assert torch.equal(vocabulary.codes(ids), codes)
    mask = vocabulary.mask()
    assert bool(mask.gather(1, ids[0][:, None]).all())
    assert int(mask.sum()) == sum(segment.count * sum(segment.codebooks) for segment in segments)
    for positions in range(codes.shape[1] + 1):  # prefixes are prefixes
        places = vocabulary.places(positions)
        assert torch.equal(vocabulary.ids(codes[:, :positions]), ids[:, :places])
        assert torch.equal(vocabulary.codes(ids[:, :places]), codes[:, :positions])


def test_scales_of_one_codebook_may_share():
    scales = tuple(Segment(f"scale{k}", (k, k), (16,)) for k in (1, 2, 3))
    assert Vocabulary(scales).size == 48
    shared = Vocabulary(scales, share=True)
    assert shared.size == 16
    assert shared.uniform
    assert not Vocabulary(scales, share=True, text=1).uniform
    assert Vocabulary(TWO, share=True).size == 10 + 8 + 5


def test_what_does_not_fit():
    vocabulary = Vocabulary(TWO)
    codes = drawn(TWO)
    with pytest.raises(MismatchError, match="layout"):
        vocabulary.ids(Tokens((Segment("grid", (8, 8), (64,)),), codes=torch.zeros(1, 64, dtype=torch.long)))
    with pytest.raises(MismatchError, match="7 positions of 2 codes"):
        vocabulary.ids(torch.zeros(1, 9, 2, dtype=torch.long))
    with pytest.raises(InputError, match="its own codebook"):
        vocabulary.ids(codes + 9)
    ids = vocabulary.ids(codes)
    with pytest.raises(InputError, match="within a position"):
        vocabulary.codes(ids[:, :4])
    ids[1, 2] = 12
    with pytest.raises(InputError, match=r"id 12 at place 2 of item 1; expected 0\.\.9"):
        vocabulary.codes(ids)
    with pytest.raises(ConfigError, match="no codebook"):
        Vocabulary((Segment("latent", (4,), dim=8),))
    with pytest.raises(ConfigError, match="text=-1"):
        Vocabulary(TWO, text=-1)
    with pytest.raises(InputError, match="places"):
        vocabulary.mask(3, 12)
    kept = Tokens(TWO, codes=codes, keep=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(InputError, match="keep"):
        vocabulary.ids(kept)


def test_whatever_a_masked_model_writes_decodes():
    vocabulary = Vocabulary(TWO, text=20, extras={"end": 1})
    keep, rng = PlaceMask(vocabulary, start=4), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (3, 4), generator=rng)
    for _ in range(vocabulary.length):
        logits = keep(ids, torch.randn(3, vocabulary.size, generator=rng))
        ids = torch.cat([ids, logits.softmax(-1).multinomial(1, generator=rng)], 1)
    tokens = vocabulary.tokens(ids[:, 4:])
    assert tokens.segments == TWO
    assert torch.equal(vocabulary.ids(tokens), ids[:, 4:])
    logits = torch.randn(3, vocabulary.size, generator=rng)
    assert torch.equal(keep(ids, logits), logits)  # beyond the picture, text goes on
    with pytest.raises(InputError, match="prompt"):
        keep(ids[:, :2], logits)
    with pytest.raises(MismatchError, match="logits"):
        keep(ids[:, :5], logits[:, :20])
