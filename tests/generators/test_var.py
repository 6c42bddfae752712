"""VAR: it learns, samples per item scale by scale, keeps what is known, smooths, and reads its authors' files."""

from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok import checkpoints
from vistok.errors import InputError, MismatchError
from vistok.generators import var as generator
from vistok.tokenizers import var as tokenizer
from vistok.training.optimizer import undecayed


@pytest.fixture(scope="module")
def tok():
    torch.manual_seed(0)
    tok = vistok.create("var-tiny")
    draw_weights(tok)
    return tok


@pytest.fixture
def model(tok):
    torch.manual_seed(0)
    model = vistok.create("var-generator-tiny")
    draw_weights(model)
    return model.attach(tok)


def test_an_item_does_not_depend_on_its_batch(model):
    together = model.generate([3, 1, 4], seed=10, guidance=1.5)
    alone = model.generate(1, seed=11, guidance=1.5)
    assert torch.equal(together.codes[1], alone.codes[0])
    assert not torch.equal(model.generate(1, seed=12, guidance=1.5).codes, alone.codes)


@pytest.mark.parametrize("name", ["var-generator-tiny", "var-generator-tiny-shared"])
def test_one_pass_a_scale_with_memory_taken_once_agrees_with_one_pass_over_all(name):
    torch.manual_seed(0)
    model = vistok.create(name)
    draw_weights(model)
    seen, caches = [], []
    model.trunk.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    cache = model.trunk.cache
    model.trunk.cache = lambda *args: caches.append(args) or cache(*args)
    tokens = model.generate([3, 1], guidance=2.0, temperature=0.0)
    assert seen == [(4, length) for length in model.lengths]
    assert caches == [(4, model.spec.length)]
    with torch.no_grad():
        labels = torch.tensor([3, 1])
        with_class = model.logits(tokens.codes, labels)
        without = model.logits(tokens.codes, torch.full_like(labels, model.null))
    scale = 1 + (model.level / model.level.max())[None, :, None]
    guided = without + scale * (with_class - without)
    best = guided.amax(-1)
    chosen = guided.gather(-1, tokens.codes[..., None])[..., 0]
    assert (best - chosen).max() < 1e-4 * guided.abs().max()


def test_whole_scales_that_are_known_stay_and_the_rest_follows(model):
    whole = model.generate([3, 1], seed=2)
    seen = []
    hook = model.trunk.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    again = model.generate([3, 1], seed=2, known=whole.prefix(14))
    hook.remove()
    assert torch.equal(again.codes, whole.codes)
    assert seen == [1 + 4 + 9 + 25, 64]  # what is known is read in one pass, with the next scale
    mixed = model.generate([3, 1], seed=2, known=whole.prefix([5, 39]))
    assert torch.equal(mixed.codes, whole.codes)
    complete = model.generate([3, 1], seed=7, known=whole)
    assert torch.equal(complete.codes, whole.codes)
    other = model.generate([3, 1], seed=7, known=whole.prefix(14))
    assert torch.equal(other.codes[:, :14], whole.codes[:, :14])
    assert not torch.equal(other.codes[:, 14:], whole.codes[:, 14:])


@pytest.mark.parametrize("more_smooth", [False, True])
def test_a_region_is_drawn_anew(model, tok, more_smooth):
    given = tok.encode(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    hole = torch.zeros(2, 1, 32, 32)
    hole[:, :, :16] = 1
    keep = model.outside(hole)
    assert keep.shape == (2, 103)
    assert not keep[:, 0].any()  # half of the only cell
    assert keep[:, 1:5].tolist() == [[False, False, True, True]] * 2
    drawn = model.generate([3, 1], seed=1, known=replace(given, keep=keep), more_smooth=more_smooth)
    assert torch.equal(drawn.codes[keep], given.codes[keep])
    assert not torch.equal(drawn.codes[~keep], given.codes[~keep])
    whole = torch.ones(2, 1, 32, 32)
    unknown = model.generate([3, 1], seed=1, known=replace(given, keep=model.outside(whole)))
    assert torch.equal(unknown.codes, model.generate([3, 1], seed=1).codes)
    with pytest.raises(InputError, match=r"\(B, 1, H, W\)"):
        model.outside(torch.zeros(2, 32, 32))


def test_guidance_grows_with_the_scale(model):
    plain, guided = (model.generate([3, 1], seed=2, guidance=scale).codes for scale in (1.0, 6.0))
    assert torch.equal(plain[:, 0], guided[:, 0])  # none at the first scale
    assert not torch.equal(plain[:, 39:], guided[:, 39:])
    free = model.generate(count=2, seed=2)
    assert torch.equal(free.codes, model.generate(count=2, seed=2, guidance=6.0).codes)  # nothing to guide with


def test_smoothing_reads_mixtures(model, tok):
    plain, smooth = (model.generate([3, 1], seed=2, more_smooth=smooth) for smooth in (False, True))
    assert smooth.codes.shape == plain.codes.shape
    assert torch.equal(model.generate([3, 1], seed=2, more_smooth=True).codes, smooth.codes)
    pictures = model.pixels([3, 1], seed=2)
    assert pictures.shape == (2, 3, 32, 32)
    assert not torch.allclose(pictures, tok.decode(smooth), atol=1e-3)
    torch.testing.assert_close(model.pixels([3, 1], seed=2, more_smooth=False), tok.decode(plain), atol=1e-5, rtol=0)
    few = model.generate([3, 1], seed=2, more_smooth=True, temperature=0.0)
    assert torch.equal(few.codes, model.generate([3, 1], seed=2, temperature=0.0).codes)


def test_the_picture_can_be_watched(model, tok):
    lengths, sums = [], []
    tokens = model.generate([3], stream=lambda codes, f_hat: (lengths.append(codes.shape[1]), sums.append(f_hat)))
    assert tuple(lengths) == tuple(tok.spec.prefixes)
    torch.testing.assert_close(sums[-1], tok.embed(tokens))


def test_what_it_does_not_know_is_refused(model, tok):
    with pytest.raises(InputError, match=r"0\.\.9"):
        model.generate(10)
    with pytest.raises(InputError, match="guidance=-1"):
        model.generate(1, guidance=-1.0)
    with pytest.raises(InputError, match="more_smooth"):
        model.generate(1, more_smoth=True)
    with pytest.raises(MismatchError, match="not"):
        model.attach(vistok.create("vqgan-tiny"))
    with pytest.raises(MismatchError, match="scale_5"):
        model.attach(vistok.create("var-tiny-cosine"))
    with pytest.raises(MismatchError, match="was made for"):
        model.attach(vistok.create("var-tiny"))
    alone = vistok.create("var-generator-tiny")
    batch = {"codes": torch.zeros(1, 103, dtype=torch.long), "label": torch.zeros(1)}
    for act in (lambda: alone.generate(1), lambda: alone.loss(batch, 0, torch.Generator())):
        with pytest.raises(InputError, match="attach"):
            act()
    with pytest.raises(InputError, match="attach"):
        alone.pixels(1)
    with pytest.raises(MismatchError, match="8 numbers"):
        vistok.create("var-generator-tiny", code_dim=8).attach(tok)


def test_it_learns_codes(tok):
    torch.manual_seed(0)
    model = vistok.create("var-generator-tiny").attach(tok).train()
    assert not any(value.requires_grad for value in model.quantizer.parameters())
    batch = {"pixels": torch.rand(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 3])}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 3e-3)
    rng = torch.Generator().manual_seed(0)
    totals = []
    for step in range(60):
        total = model.loss(batch, step, rng)["code"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[0] == pytest.approx(4.16, abs=0.05)  # log 64: the head starts near zero
    assert totals[-1] < 0.6 * totals[0]
    assert all(torch.equal(a, b) for a, b in zip(model.quantizer.parameters(), tok.quantizer.parameters(), strict=True))


def test_what_does_not_decay():
    for name, blocks in (("var-generator-tiny", "log_length"), ("var-generator-tiny-shared", "offsets")):
        model = vistok.create(name)
        spared = {id(value) for value in undecayed(model)}
        names = {key for key, value in model.named_parameters() if id(value) in spared}
        assert {"start", "positions", "levels.weight"} <= names
        assert sum(blocks in key for key in names) == 2
        assert len(names) == 5


def save_trainer(model, tok, path):
    """As the authors' trainer leaves it: tokenizer and transformer side by side, below `trainer`."""
    parts = {
        "config": {"prog_it": 3},
        "var_wo_ddp": generator.key_table(model.config).to_theirs(model.state_dict()),
        "vae_local": tokenizer.key_table(tok.config).to_theirs(tok.state_dict()),
        "var_opt": {"optimizer_state": {}},
    }
    torch.save({"epoch": 1, "iter": 0, "trainer": parts, "args": {"depth": 2}}, path)


CONFIG = """{depth: 2, embed_dim: 64, num_heads: 4, patch_nums: [1, 2, 3, 5, 8], attn_l2_norm: true, num_classes: 10,
 vae_kwargs: %s}"""
VAE = "{z_channels: 16, vocab_size: 64, ch: 32, ch_mult: [1, 1, 2], num_res_blocks: 1, patch_nums: [1, 2, 3, 5, 8]}"


def test_a_trainers_checkpoint_gives_both(model, tok, tmp_path):
    path = tmp_path / "ar-ckpt.pth"
    save_trainer(model, tok, path)
    done = checkpoints.convert_file(path, "var", tmp_path / "model")
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    options = {"guidance": 1.5, "top_k": 0, "top_p": 1.0, "seed": 1}
    assert torch.equal(back.generate([1, 2], **options).codes, model.generate([1, 2], **options).codes)
    (tmp_path / "vae.yaml").write_text(VAE)
    done = checkpoints.convert_file(
        path, "var", tmp_path / "tokenizer", key="trainer.vae_local", config=tmp_path / "vae.yaml"
    )
    assert done["role"] == "tokenizer"
    assert vistok.load(tmp_path / "tokenizer").fingerprint == tok.fingerprint


def test_a_plain_file_waits_for_its_tokenizer(model, tok, tmp_path):
    theirs = generator.key_table(model.config).to_theirs(model.state_dict())
    assert not any(key.startswith(("quantize", "encoder")) for key in theirs)
    path, config = tmp_path / "var.pth", tmp_path / "config.yaml"
    torch.save(theirs, path)
    config.write_text(CONFIG % VAE)
    done = checkpoints.convert_file(path, "var", tmp_path / "model", config=config)
    assert done["role"] == "generator"
    back = vistok.load(tmp_path / "model")
    assert back.config.factor == 4
    with pytest.raises(InputError, match="attach"):
        back.generate(1)
    back.attach(tok)
    options = {"guidance": 1.5, "top_k": 0, "top_p": 1.0, "seed": 1}
    assert torch.equal(back.generate([1, 2], **options).codes, model.generate([1, 2], **options).codes)
    checkpoints.export_file(tmp_path / "model", tmp_path / "back.pth")
    assert checkpoints.read(tmp_path / "back.pth").keys() == theirs.keys()


def test_a_saved_generator_needs_no_tokenizer_to_draw(model, tok, tmp_path):
    model.save(tmp_path / "model")
    back = vistok.load(tmp_path / "model")
    tokens = back.generate([1, 2], seed=1)
    assert torch.equal(tokens.codes, model.generate([1, 2], seed=1).codes)
    assert tokens.source == tok.source
    assert tok.decode(tokens).shape == (2, 3, 32, 32)


def test_a_tokenizer_of_other_refinements_is_taken_as_it_is():
    torch.manual_seed(0)
    tok = vistok.create("var-tiny", phis=0, ratio=0.25)
    draw_weights(tok)
    model = vistok.create("var-generator-tiny")
    draw_weights(model)
    model.attach(tok)
    assert len(model.quantizer.convs) == 5
    tokens = model.generate([1])
    torch.testing.assert_close(model.quantizer.decode(tokens.codes), tok.quantizer.decode(tokens.codes))
    assert not any(value.requires_grad for value in model.quantizer.parameters())


def test_it_runs_in_half_precision_and_under_autocast(model, tok):
    torch.manual_seed(0)
    half = vistok.create("var-generator-tiny", dtype=torch.bfloat16)
    half.attach(tok)
    assert half.generate([0, 1], guidance=2.0, top_k=8).codes.min() >= 0
    batch = {"pixels": torch.rand(2, 3, 32, 32), "label": torch.tensor([0, 1])}
    plain = model.train().loss(batch, 0, torch.Generator().manual_seed(0))["code"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss(batch, 0, torch.Generator().manual_seed(0))["code"]
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(plain.item(), rel=0.05)
    mixed.backward()
