"""FAR: it learns, samples per item, goes on from what is known, and its tokens decode."""

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import InputError
from vistok.generators.fqgan import key_table


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vistok.create("fqgan-far-tiny")
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
    complete = model.generate([3, 1], seed=7, known=whole)
    assert torch.equal(complete.codes, whole.codes)


def test_without_a_class(model):
    assert model.generate(count=2).codes.shape == (2, 64, 2)
    with pytest.raises(InputError, match=r"0\.\.9"):
        model.generate(10)


def test_its_tokens_decode(model):
    tok = vistok.create("fqgan-tiny")
    model.attach(tok)
    tokens = model.generate([0, 1])
    assert tokens.source == tok.source
    assert tok.decode(tokens).shape == (2, 3, 32, 32)


def test_it_learns_codes(model):
    torch.manual_seed(0)
    model = vistok.create("fqgan-far-tiny").train()
    codes = torch.randint(0, 64, (4, 64, 2), generator=torch.Generator().manual_seed(1))
    batch = {"codes": codes, "label": torch.tensor([0, 1, 2, 3])}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(0)
    totals = []
    for step in range(25):
        total = torch.stack(list(model.loss(batch, step, rng).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[0] == pytest.approx(4.16, abs=0.05)  # log 64: the outputs start at zero
    assert totals[-1] < 0.6 * totals[0]


def test_an_authors_checkpoint_file_converts(model, tmp_path):
    path = tmp_path / "far.pt"
    torch.save({"model": key_table(model.config).to_theirs(model.state_dict())}, path)
    config = tmp_path / "config.yaml"
    config.write_text(
        "{dim: 64, n_layer: 2, n_head: 4, ar_n_layer: 1, ffn_hidden: 176, vocab_size: 64, block_size: 64, "
        "num_classes: 10, sub_code_order: [vis, sem]}"
    )
    done = checkpoints.convert_file(path, "fqgan", tmp_path / "model", config=config)
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    back.sampling = model.sampling
    assert torch.equal(back.generate([1, 2], seed=1).codes, model.generate([1, 2], seed=1).codes)
    assert checkpoints.convert(checkpoints.read(path), "fqgan").model is type(model)
    checkpoints.export_file(tmp_path / "model", tmp_path / "back.pt")
    assert checkpoints.read(tmp_path / "back.pt").keys() == checkpoints.read(path).keys()


def test_one_position_a_step_and_memory_taken_once(model):
    seen = []
    model.trunk.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    whole = model.generate([3, 1], guidance=2.0)
    assert seen == [(4, 1)] * 64
    seen.clear()
    model.generate([3, 1], guidance=2.0, known=whole.prefix(10))
    assert seen == [(4, 11)] + [(4, 1)] * 53


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("fqgan-far-tiny", dtype=torch.bfloat16)
    assert half.generate([0, 1], guidance=2.0, top_k=8).codes.min() >= 0
