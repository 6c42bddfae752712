"""LlamaGen as a Llama of transformers: equal logits, equal greedy codes, there and back, and what cannot be."""

from dataclasses import replace

import pytest
import torch

import vistok
from tests.golden import draw_weights
from vistok.errors import ConfigError, InputError, MismatchError, OutputError
from vistok.generators._llama import install_positions
from vistok.generators.llamagen import TINY, LlamaGen, LlamaGenConfig
from vistok.layout import Segment
from vistok.nn.gpt import GPTSize
from vistok.vocabulary import PlaceMask

transformers = pytest.importorskip("transformers")


def made(name, **changes):
    model = vistok.create(name, **changes)
    draw_weights(model)
    return model


def both(model, llama, labels=(3, 1, 10)):
    """Logits (B, N, V) over codes of ours, and of a Llama that reads the class as its first id."""
    codes = torch.randint(0, 64, (len(labels), 64), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([64 + torch.tensor(labels)[:, None], codes[:, :-1]], 1)
    with torch.no_grad():
        return model.logits(codes, torch.tensor(labels)), llama(ids).logits[..., :64]


@pytest.mark.parametrize("heads", [None, 2, 1])
def test_equal_logits_with_one_dimensional_positions(heads):
    model = made("llamagen-tiny", positions="1d", trunk=replace(TINY.trunk, kv_heads=heads))
    ours, theirs = both(model, model.to_llama())
    torch.testing.assert_close(theirs, ours, atol=2e-5 * float(ours.abs().max()), rtol=0)


def test_equal_logits_and_codes_with_positions_of_the_grid(tmp_path):
    model = made("llamagen-tiny")
    with pytest.raises(ConfigError, match="custom_positions=True"):
        model.to_llama()
    ours, theirs = both(model, model.to_llama(custom_positions=True))
    torch.testing.assert_close(theirs, ours, atol=2e-5 * float(ours.abs().max()), rtol=0)
    model.save_llama(tmp_path / "llama", custom_positions=True)
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert (both(model, llama)[1] - ours).abs().max() > 1e-2  # a plain Llama turns otherwise
    theirs = both(model, install_positions(llama))[1]
    torch.testing.assert_close(theirs, ours, atol=2e-5 * float(ours.abs().max()), rtol=0)
    back = LlamaGen.from_llama(tmp_path / "llama")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llamagen-tiny", "llamagen-tiny-1d"])
def test_equal_codes_through_their_cache(name):
    model = made(name)
    llama = model.to_llama(custom_positions=True)
    found = llama.generate(torch.tensor([[64 + 3], [64 + 1]]), do_sample=False)
    assert torch.equal(found[:, 1:], model.generate([3, 1], temperature=0, guidance=1.0).codes)


def test_several_codebooks_with_a_mask_for_every_place():
    segments = (Segment("holistic", (3,), (12,)), Segment("grid", (2, 2), (8, 5)))
    model = LlamaGen(replace(TINY, segments=segments, positions="1d", size=16)).eval()
    draw_weights(model)
    start = torch.tensor([[25 + 4], [25]])
    keep = transformers.LogitsProcessorList([PlaceMask(model.vocabulary, start=1)])
    found = model.to_llama().generate(start, do_sample=False, logits_processor=keep)
    tokens = model.vocabulary.tokens(found[:, 1:], model.spec)
    assert torch.equal(tokens.codes, model.generate([4, 0], temperature=0, guidance=1.0).codes)


def test_there_and_back(tmp_path):
    model = made("llamagen-tiny-1d")
    model.save_llama(tmp_path / "llama")
    back = LlamaGen.from_llama(tmp_path / "llama")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[key], value) for key, value in model.state_dict().items())
    with pytest.raises(OutputError, match="exists"):
        model.save_llama(tmp_path / "llama")


@pytest.mark.parametrize("tied", [False, True])
def test_a_foreign_llama(tied):
    torch.manual_seed(0)
    plain = transformers.LlamaConfig(
        vocab_size=64 + 11,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = transformers.LlamaForCausalLM(plain).eval()
    with pytest.raises(InputError, match="config=LlamaGenConfig"):
        LlamaGen.from_llama(llama)
    config = LlamaGenConfig(GPTSize(32, 1, 4), (Segment("grid", (8, 8), (64,)),), size=32, classes=10)
    model = LlamaGen.from_llama(llama, config)
    assert (model.config.positions, model.config.base, model.config.trunk.hidden) == ("1d", 500.0, 48)
    ours, theirs = both(model, llama)
    torch.testing.assert_close(theirs, ours, atol=2e-5 * float(ours.abs().max()), rtol=0)
    with pytest.raises(MismatchError, match="75 ids"):
        LlamaGen.from_llama(llama, replace(config, classes=11))


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="text"):
        made("llamagen-tiny-t2i").to_llama(custom_positions=True)
    small = {"vocab_size": 75, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None}
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    for more, told in (({"attention_bias": True}, "biases"), (scaled, "scaled"), ({"head_dim": 16}, "16 wide")):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **more))
        with pytest.raises(ConfigError, match=told):
            LlamaGen.from_llama(llama, TINY)
    with pytest.raises(InputError, match="not made from a LlamaGen"):
        install_positions(transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)))
