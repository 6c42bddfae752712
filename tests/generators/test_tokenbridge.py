"""TokenBridge's generator: per-item draws, known positions, orders, its two heads, and that it learns."""

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import InputError
from vistok.generators.tokenbridge import key_table
from vistok.sampling.tokens import Sampling
from vistok.tokens import Tokens


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vistok.create("tokenbridge-generator-tiny")
    draw_weights(model)
    return model


def test_an_item_does_not_depend_on_its_batch(model):
    together = model.generate([3, 1, 4], seed=10)
    assert torch.equal(together.codes[1], model.generate(1, seed=11).codes[0])
    assert not torch.equal(together.codes[1], model.generate(1, seed=12).codes[0])
    assert together.codes.shape == (3, 16, 8)


@pytest.mark.parametrize("steps", [1, 3, 16, 40])
def test_every_position_is_found_in_any_number_of_steps(model, steps):
    model.head.bias.data[:, 0] = -1e9  # code 0 never
    assert int(model.generate([0, 1], steps=steps).codes.min()) > 0


def test_what_is_known_stays_wherever_it_is(model):
    whole = model.generate([3, 1], seed=2)
    keep = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 7
    known = Tokens(whole.segments, codes=torch.where(keep[..., None], whole.codes, -1), keep=keep)
    again = model.generate([3, 1], seed=5, known=known)
    assert torch.equal(again.codes[keep], whole.codes[keep])
    assert not torch.equal(again.codes, whole.codes)
    assert torch.equal(model.generate([3, 1], seed=5, known=whole).codes, whole.codes)
    keep[0, :] = True
    with pytest.raises(InputError, match="as many known"):
        model.generate([3, 1], known=Tokens(whole.segments, codes=whole.codes, keep=keep))


def test_steps_of_the_head_are_its_teacher_forced_pass(model):
    """But for the first slot's input, where the authors' sampler differs from their training."""
    model.head.shifts.data[:, 0] = 0
    z, uniform = torch.randn(5, 96), torch.rand(5, 8)
    with torch.no_grad():
        codes = model.head.sample(z, uniform, Sampling(temperature=0))
        assert torch.equal(model.head(z, codes).argmax(-1), codes)


def test_the_parallel_head_reads_no_codes():
    torch.manual_seed(0)
    model = vistok.create("tokenbridge-generator-tiny", channel_head="parallel")
    draw_weights(model)
    z = torch.randn(2, 96)
    with torch.no_grad():
        a, b = (model.head(z, torch.full((2, 8), code)) for code in (0, 5))
    assert torch.equal(a, b)
    assert model.generate(0).codes.shape == (1, 16, 8)
    sequential = vistok.create("tokenbridge-generator-tiny")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in sequential.parameters())


def test_masks_are_drawn_as_published(model):
    rng = torch.Generator().manual_seed(0)
    counts = [model._draw_masked(2, rng).shape[1] for _ in range(300)]
    assert min(counts) >= 12  # ceil(16 * 0.7)
    assert max(counts) == 16
    assert sum(counts) / len(counts) > 14


def test_it_learns_and_its_tokens_decode(model):
    torch.manual_seed(0)
    tok = vistok.create("tokenbridge-tiny")
    model = vistok.create("tokenbridge-generator-tiny").attach(tok).train()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batch = {"pixels": pixels, "label": torch.tensor([0, 1, 2, 3])}
    optimizer, rng, totals = torch.optim.AdamW(model.parameters(), 2e-3), torch.Generator().manual_seed(0), []
    for step in range(25):
        total = model.loss(batch, step, rng)["cross_entropy"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    assert tok.decode(model.generate([0, 1])).shape == (2, 3, 32, 32)
    with pytest.raises(InputError, match="schedule"):
        model.generate(0, schedule="cosine")
    with pytest.raises(InputError, match="steps"):
        model.generate(0, steps=0)
    with pytest.raises(InputError, match="did you mean 'steps'"):
        model.generate(0, step=3)


def test_averaged_weights_of_an_authors_file_convert(model, tmp_path):
    theirs = key_table(model.config).to_theirs(model.state_dict())
    averaged = {key: value for key, value in theirs.items() if key not in ("channel_mask", "boundaries")}
    averaged.pop("reconstruction_values")
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": theirs, "model_ema": averaged, "epoch": 1}, path)
    done = checkpoints.convert_file(path, "tokenbridge", tmp_path / "model")
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    assert back.config.head_heads == 4
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_one_evaluation_a_step_both_branches_in_one_batch(model):
    seen = []
    model.decoder_norm.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model.generate([0, 1, 2], steps=4, guidance=2.0)
    assert seen == [6] * 4
    seen.clear()
    model.generate([0, 1, 2], steps=4, guidance=1.0)
    assert seen == [3] * 4


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("tokenbridge-generator-tiny", dtype=torch.bfloat16)
    assert half.generate([0, 1], guidance=2.0, steps=3).codes.min() >= 0
