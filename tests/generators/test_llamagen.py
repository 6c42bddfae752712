"""LlamaGen: per-item draws, the cache, guidance, text, any layout, learning, and the authors' files."""

from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import ConfigError, InputError, MismatchError
from vistok.generators.llamagen import TINY, LlamaGen, LlamaGenConfig, key_table
from vistok.layout import Segment
from vistok.nn.gpt import GPTSize
from vistok.nn.t5_text import T5Features
from vistok.tokens import Tokens


def made(name="llamagen-tiny", **changes):
    model = vistok.create(name, **changes)
    draw_weights(model)
    return model


@pytest.fixture
def model():
    return made()


def text(items, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (items, 1), generator=rng)
    mask = torch.arange(6) >= 6 - lengths
    return T5Features(torch.randn(items, 6, 20, generator=rng) * mask[..., None], mask)


def greedy(model, condition, guidance=1.0):
    """Without a cache: the whole sequence anew for every code."""
    items = len(condition)
    codes = torch.zeros(items, model.spec.length, dtype=torch.long)
    none = model.no_condition(items)
    if isinstance(condition, T5Features):
        none = T5Features(none.features, condition.present)
    with torch.no_grad():
        for place in range(model.spec.length):
            logits, free = (model.logits(codes, one)[:, place] for one in (condition, none))
            codes[:, place] = (free + guidance * (logits - free)).argmax(-1)
    return codes


def test_an_item_does_not_depend_on_its_batch(model):
    together = model.generate([3, 1, 4], seed=10, guidance=1.5)
    assert torch.equal(together.codes[1], model.generate(1, seed=11, guidance=1.5).codes[0])
    assert not torch.equal(model.generate(1, seed=12, guidance=1.5).codes[0], together.codes[1])


@pytest.mark.parametrize("name", ["llamagen-tiny", "llamagen-tiny-1d"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_cache_is_the_whole_pass(name, guidance):
    model = made(name)
    found = model.generate([3, 1], temperature=0, guidance=guidance).codes
    assert torch.equal(found, greedy(model, torch.tensor([3, 1]), guidance))
    assert torch.equal(found, model.generate([3, 1], temperature=0, guidance=guidance, pack=False).codes)


def test_text_is_masked_in_the_cache_too():
    model, condition = made("llamagen-tiny-t2i"), text(3)
    found = model.generate(condition, temperature=0, guidance=3.0).codes
    assert torch.equal(found, greedy(model, condition, 3.0))
    noisy = torch.where(condition.present[..., None], condition.features, 5.0)
    again = model.generate(T5Features(noisy, condition.mask), temperature=0, guidance=3.0).codes
    assert torch.equal(again, found)  # what is padding does not matter


def test_prompts_need_an_encoder_and_then_do():
    model = made("llamagen-tiny-t2i")
    with pytest.raises(InputError, match="attach_text"):
        model.generate("a dog")
    model.attach_text(lambda texts: text(len(texts), seed=len(texts[0])))
    assert torch.equal(model.generate("a dog", seed=1).codes, model.generate(text(1, 5), seed=1).codes)
    assert model.generate(["a dog", "a cat"]).codes.shape == (2, 64)
    assert model.generate("a dog", count=3).codes.shape == (3, 64)
    assert model.generate(count=2).codes.shape == (2, 64)
    for wrong, told in ((3, "takes prompts"), (torch.zeros(2, 5, 20), r"\(5, 20\)"), (["a", 1], "takes prompts")):
        with pytest.raises(InputError, match=told):
            model.generate(wrong)
    with pytest.raises(InputError, match="2 texts for 3 items"):
        model.conditions(text(2), 3)
    with pytest.raises(InputError, match="not text"):
        made().attach_text(lambda texts: text(1))


def test_wrong_conditions_and_settings(model):
    with pytest.raises(InputError, match=r"0\.\.9"):
        model.generate(10)
    with pytest.raises(InputError, match="no class 'a dog'"):
        model.generate("a dog")
    model.class_names = ("cat", "dog")
    with pytest.raises(InputError, match="did you mean 'dog'"):
        model.generate("dgo")
    for setting in ({"guidance": -1.0}, {"temperature": -0.1}, {"top_k": -2}, {"top_p": 0.0}, {"guidance": torch.nan}):
        with pytest.raises(InputError, match=next(iter(setting))):
            model.generate(0, **setting)
    with pytest.raises(InputError, match="cfg_interval=-2"):
        model.generate(0, cfg_interval=-2)
    with pytest.raises(InputError, match="did you mean 'cfg_interval'"):
        model.generate(0, cfg_intervall=2)


def test_a_model_that_always_had_a_class():
    model = made(class_dropout=0.0)
    assert model.class_table.weight.shape[0] == 10
    assert model.generate([1, 2], guidance=1.0).codes.shape == (2, 64)
    for condition, guidance in ((1, 2.0), (None, 1.0)):
        with pytest.raises(InputError, match="class_dropout 0"):
            model.generate(condition, guidance=guidance)


def test_what_is_known_stays_and_the_rest_follows(model):
    whole = model.generate([3, 1], seed=2)
    again = model.generate([3, 1], seed=2, known=whole.prefix(20))
    assert torch.equal(again.codes, whole.codes)
    assert torch.equal(model.generate([3, 1], seed=7, known=whole).codes, whole.codes)
    keep = (torch.arange(64) > 5).expand(2, -1)
    with pytest.raises(InputError, match="prefix"):
        model.generate([3, 1], known=Tokens(whole.segments, codes=whole.codes, keep=keep))


def test_after_the_interval_half_of_the_batch_is_left_out(model):
    seen = []
    model.trunk.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    found = model.generate([3, 1], guidance=2.0, cfg_interval=5, temperature=0).codes
    assert seen == [(4, 1)] * 7 + [(2, 1)] * 57
    guided = model.generate([3, 1], guidance=2.0, temperature=0)
    assert torch.equal(found[:, :7], guided.codes[:, :7])
    rest = model.generate([3, 1], guidance=1.0, temperature=0, known=guided.prefix(7))
    assert torch.equal(found, rest.codes)


def test_any_discrete_layout():
    segments = (Segment("holistic", (3,), (12,)), Segment("grid", (2, 2), (8, 5)))
    config = replace(TINY, segments=segments, positions="1d", size=16)
    with pytest.raises(ConfigError, match="positions='1d'"):
        replace(config, positions="2d")
    model = LlamaGen(config)
    draw_weights(model)
    assert model.table.num_embeddings == 12 + 8 + 5
    whole = model.eval().generate([1, 2, 3], seed=4)
    assert whole.codes.shape == (3, 7, 2)
    assert bool((whole.codes[:, :3, 1] == -1).all())
    assert int(whole.codes[:, 3:, 1].max()) < 5
    again = model.generate([1, 2, 3], seed=4, known=whole.prefix(5))
    assert torch.equal(again.codes, whole.codes)
    loss = model.loss({"codes": whole.codes, "label": torch.tensor([1, 2, 3])}, 0, torch.Generator())
    assert float(loss["cross_entropy"].detach()) < 12


def test_its_tokens_decode(model):
    torch.manual_seed(0)
    tok = vistok.create("vqgan-llamagen-tiny")
    model.attach(tok)
    tokens = model.generate([0, 1])
    assert tokens.source == tok.source
    assert tok.decode(tokens).shape == (2, 3, 32, 32)
    with pytest.raises(MismatchError, match="grid"):
        made().attach(vistok.create("fqgan-tiny"))


@pytest.mark.parametrize("name", ["llamagen-tiny", "llamagen-tiny-t2i"])
def test_it_learns(name):
    torch.manual_seed(0)
    model = vistok.create(name).train()
    codes = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(1))
    batch = {"codes": codes, "label": torch.tensor([0, 1, 2, 3]), "text": text(4).features, "text_mask": text(4).mask}
    optimizer, rng, totals = torch.optim.AdamW(model.parameters(), 3e-3), torch.Generator().manual_seed(0), []
    for step in range(25):
        total = model.loss(batch, step, rng)["cross_entropy"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[0] == pytest.approx(4.16, abs=0.05)  # log 64: the outputs start at zero
    assert totals[-1] < 0.7 * totals[0]


def test_batches_that_do_not_fit(model):
    codes, rng = torch.zeros(2, 64, dtype=torch.long), torch.Generator()
    with pytest.raises(InputError, match="labels"):
        model.loss({"codes": codes}, 0, rng)
    with pytest.raises(MismatchError, match="32 tokens an item"):
        model.loss({"codes": codes[:, :32], "label": torch.zeros(2)}, 0, rng)
    with pytest.raises(InputError, match="codebook"):
        model.loss({"codes": codes + 64, "label": torch.zeros(2)}, 0, rng)
    with pytest.raises(InputError, match="learns with text"):
        made("llamagen-tiny-t2i").loss({"codes": codes}, 0, rng)
    with pytest.raises(ConfigError, match="either on classes or on text"):
        LlamaGenConfig(GPTSize(64, 1, 4), text=(6, 20))
    with pytest.raises(ConfigError, match="3 heads of keys"):
        GPTSize(64, 1, 4, kv_heads=3)


def test_invalid_items_do_not_count():
    model = made("llamagen-tiny-t2i")
    codes = torch.randint(0, 64, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        some = model.loss({"codes": codes, "text": text(3), "valid": [1, 0, 1]}, 0, torch.Generator())
        told = text(3)
        two = {"codes": codes[::2], "text": T5Features(told.features[::2], told.mask[::2])}
        torch.testing.assert_close(some, model.loss(two, 0, torch.Generator()))


@pytest.mark.parametrize("wrapper", ["model", "module", None])
def test_the_authors_layouts_convert(model, tmp_path, wrapper):
    theirs = key_table(model.config).to_theirs(model.state_dict())
    stored = theirs | {"freqs_cis": torch.zeros(65, 8, 2)}  # of older files; tells heads and grid
    torch.save({wrapper: stored, "steps": 1} if wrapper else stored, tmp_path / "far.pt")
    done = checkpoints.convert_file(tmp_path / "far.pt", "llamagen", tmp_path / "model")
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    assert (back.config.trunk.heads, back.config.segments) == (4, model.config.segments)
    assert all(torch.equal(back.state_dict()[key], value) for key, value in model.state_dict().items())
    checkpoints.export_file(tmp_path / "model", tmp_path / "back.pt")
    assert checkpoints.read(tmp_path / "back.pt").keys() == theirs.keys()


def test_text_and_configs_survive_a_folder(tmp_path):
    for name in ("llamagen-tiny-t2i", "llamagen-tiny-1d"):
        model = made(name)
        model.save(tmp_path / name)
        assert vistok.load(tmp_path / name).config == model.config


def test_it_runs_in_half_precision():
    torch.manual_seed(0)
    half = vistok.create("llamagen-tiny", dtype=torch.bfloat16)
    assert half.generate([0, 1], guidance=2.0, top_k=8).codes.min() >= 0
    half = vistok.create("llamagen-tiny-t2i", dtype=torch.bfloat16)
    assert half.generate(text(2), guidance=2.0, top_k=8).codes.min() >= 0
