"""The published VAR tokenizer and transformers: every key has its place, sizes are told from shapes."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.generators import var as generator
from vistok.tokenizers import var as tokenizer

TOKENIZER = "vae_ch160v4096z32"
GENERATORS = {f"var_d{depth}": f"var-d{depth}" for depth in (16, 20, 24, 30, 36)}


@pytest.mark.parametrize("variant", ["var-vae", "var-vae-512"])
def test_every_key_of_the_tokenizer_has_its_place(variant):
    state = shapes("var", TOKENIZER)
    check("var", variant, state, "tokenizer")
    assert tokenizer.recognise(state) == tokenizer.VARIANTS["var-vae"]  # both sizes read the same file


@pytest.mark.parametrize("name", GENERATORS)
def test_every_key_of_the_generators_has_its_place(name):
    state, variant = shapes("var", name), GENERATORS[name]
    check("var", variant, state, "generator")
    assert generator.recognise(state) == generator.VARIANTS[variant]


def test_a_file_of_both_gives_the_generator_its_quantizer():
    both = shapes("var", TOKENIZER) | shapes("var", "var_d16")
    config = generator.recognise(both)
    assert config == generator.VARIANTS["var-d16"]
    table = generator.key_table(config)
    assert not table.left_over(list(both))
    ours = table.to_ours(both)
    assert ours["quantizer.codebook"] is both["quantize.embedding.weight"]
    assert ours["quantizer.convs.3.weight"] is both["quantize.quant_resi.qresi_ls.3.weight"]


def test_no_manifest_is_forgotten():
    assert set(names("var")) <= {TOKENIZER, *GENERATORS}
