"""The arms of the reducers' reproductions, with a few steps and few pictures: what they measure is what they say."""

from types import SimpleNamespace

import torch

from vistok.evaluation.reproduction import find
from vistok.nn.classifier import Classifier
from vistok.reducer import Context
from vistok.reducers.tome import ToMe, ToMeConfig
from vistok.reproductions import divprune, tome
from vistok.reproductions._small_vit import CONFIG, Leaving, LeavingConfig, accuracy, logits


def test_arms_that_choose_once_have_as_much_work():
    for r in tome.AMOUNTS:
        merged = ToMe(ToMeConfig(r=r)).plan(tome.TOKENS, tome.DEPTH)
        assert merged[-1] == tome.TOKENS - tome.DEPTH * r
        assert sum(merged) == tome.DEPTH * tome.same_work(r)


def test_leaving_out_by_chance_and_by_place():
    tokens = torch.arange(10.0).view(1, 10, 1).expand(2, -1, -1)
    even, _ = Leaving(LeavingConfig("even", r=4)).reduce(tokens)
    assert even[0, :, 0].tolist() == [0, 2, 4, 5, 7, 9]
    first, state = Leaving(LeavingConfig(keep=3)).reduce(tokens, Context(layer=0, layers=2))
    again, _ = Leaving(LeavingConfig(keep=3)).reduce(tokens, Context(layer=0, layers=2))
    other, _ = Leaving(LeavingConfig(keep=3, draw=1)).reduce(tokens, Context(layer=0, layers=2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert state.index.sort(1).values.equal(state.index)


def test_accuracy_counts_what_is_right():
    torch.manual_seed(0)
    net = Classifier(CONFIG).eval()
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    labels = logits(net, pixels.float() / 255, None).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    assert accuracy(net, (pixels, labels), None) == 75
    assert accuracy(net, (pixels, labels), Leaving(LeavingConfig(r=0))) == 75
    assert accuracy(net, (pixels, labels), ToMe(ToMeConfig(r=0))) == 75


def test_a_reader_that_knows_where_to_look_answers_from_the_tokens_kept(monkeypatch):
    """A canvas's answer is the class of the quadrant asked for; choosers give places, each once."""
    features, labels = torch.randn(40, divprune.CELLS, divprune.FEATURE), torch.arange(40) % 10
    test = divprune.canvases(features, labels, 30, torch.Generator().manual_seed(0))
    for item in range(30):
        quadrant = int(test["question"][item])
        cells = test["tokens"][item][quadrant * divprune.CELLS : (quadrant + 1) * divprune.CELLS]
        source = int((features == cells).flatten(1).all(1).nonzero()[0])
        assert int(labels[source]) == int(test["label"][item])
    reader = divprune.Reader().eval()
    with torch.no_grad():
        for chooser in divprune.CHOOSERS.values():
            places = chooser(test["tokens"], reader, 6, 0)
            assert places.shape == (30, 6)
            assert all(len(row.unique()) == 6 for row in places)
        given = reader.attention(test["tokens"])
        assert given.shape == (30, 64)
        assert float(given.max()) < 1
    large = torch.randn(5, divprune.LARGE, divprune.FEATURE)
    monkeypatch.setattr(divprune, "prepared", lambda seed, context: (reader, test, large))
    found = divprune.chosen_by_difference(0, SimpleNamespace())
    assert found["farther"] == 100
    assert set(found) >= {"@4", "mean", "covers"}


def test_plans_are_whole():
    for slug in ("tome", "divprune"):
        plan = find(slug).plan()
        assert plan["rule"]
        assert plan["arms"]
