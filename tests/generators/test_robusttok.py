"""RAR: orders that anneal, samples per item, guidance that grows, and checkpoints through `convert`."""

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import InputError
from vistok.generators.robusttok import guidance_at, key_table


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vistok.create("robusttok-rar-tiny")
    draw_weights(model)
    return model


def test_an_item_does_not_depend_on_its_batch(model):
    together = model.generate([3, 1, 4], seed=10, guidance=1.5)
    alone = model.generate(1, seed=11, guidance=1.5)
    assert torch.equal(together.codes[1], alone.codes[0])
    assert not torch.equal(model.generate(1, seed=12, guidance=1.5).codes, alone.codes)


def test_what_is_known_stays_and_the_rest_follows(model):
    whole = model.generate([3, 1], seed=2)
    again = model.generate([3, 1], seed=2, known=whole.prefix(20))
    assert torch.equal(again.codes, whole.codes)
    assert torch.equal(model.generate([3, 1], seed=7, known=whole).codes, whole.codes)


def test_the_cached_steps_are_the_whole_sequence(model):
    codes = model.generate([3, 1], guidance=1.0, temperature=0).codes
    logits = model.eval().logits(codes, torch.tensor([3, 1]))
    assert torch.equal(logits[:, :-1].argmax(-1), codes)


def test_orders_anneal_to_raster(model):
    rng = torch.Generator().manual_seed(0)
    raster = torch.arange(64)
    assert [model.randomness(step) for step in (0, 500, 625, 750, 9999)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    early, middle, late = (model.orders(400, step, rng) for step in (0, 625, 800))
    assert torch.equal(early.sort(1).values, raster.expand(400, -1))
    assert not (early == raster).all(1).any()
    assert 0.4 < (middle == raster).all(1).float().mean() < 0.6
    assert (late == raster).all()


def test_logits_of_a_prefix_do_not_see_what_follows(model):
    model.eval()
    rng = torch.Generator().manual_seed(1)
    codes, labels = torch.randint(128, (2, 64), generator=rng), torch.tensor([0, 1])
    orders = torch.rand(2, 64, generator=rng).argsort(1)
    whole = model.logits(codes, labels, orders)
    changed = codes.clone()
    changed[:, 30:] = 0
    again = model.logits(changed, labels, orders)
    torch.testing.assert_close(again[:, :31], whole[:, :31])
    assert not torch.allclose(again[:, 31:], whole[:, 31:])


def test_guidance_grows(model):
    assert guidance_at(0.0, 6.0, 1.15) == 1.0
    assert guidance_at(0.5, 6.0, 1.0) == pytest.approx(3.5)
    assert guidance_at(0.9, 6.0, 0) == 6.0
    flat = model.generate(1, guidance=4.0, power=0).codes
    assert not torch.equal(flat, model.generate(1, guidance=4.0).codes)
    with pytest.raises(InputError, match="power"):
        model.generate(1, powr=1)


def test_without_a_class_and_its_tokens_decode(model):
    assert model.generate(count=2).codes.shape == (2, 64)
    tok = vistok.create("robusttok-tiny")
    tokens = model.attach(tok).generate([0, 1])
    assert tok.decode(tokens).shape == (2, 3, 32, 32)


def test_it_learns_codes_in_any_order():
    torch.manual_seed(0)
    model = vistok.create("robusttok-rar-tiny").train()
    codes = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(1))
    batch = {"codes": codes, "label": torch.tensor([0, 1, 2, 3])}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(0)
    totals = []
    for step in range(60):
        loss = model.loss(batch, step, rng)["code"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[0] == pytest.approx(4.86, abs=0.1)  # log 128
    assert totals[-1] < 0.8 * totals[0]


def test_an_authors_checkpoint_file_converts(model, tmp_path):
    path = tmp_path / "rar.bin"
    torch.save(key_table(model.config).to_theirs(model.state_dict()), path)
    done = checkpoints.convert_file(path, "robusttok", tmp_path / "model")
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    options = {"seed": 1, "guidance": 2.0, "temperature": 1.0, "power": 1.0}
    assert torch.equal(back.generate([1, 2], **options).codes, model.generate([1, 2], **options).codes)
