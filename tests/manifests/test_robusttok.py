"""The published RobustTok and RAR: every key has its place, sizes are told from shapes."""

from dataclasses import replace

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.generators import robusttok as rar
from vistok.losses.representation import ViTTeacher
from vistok.tokenizers.robusttok import VARIANTS, key_table, recognise

TOKENIZERS = {"robusttok-4096": "robusttok-4096"}
GENERATORS = {"rar-b": "robusttok-rar-b", "rar-l": "robusttok-rar-l"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_key_has_its_place(name):
    state, variant = shapes("robusttok", name), TOKENIZERS[name]
    bare = {key: value for key, value in state.items() if not key.startswith("semantic_model.")}
    assert len(bare) < len(state)
    check("robusttok", variant, bare, "tokenizer")
    config = VARIANTS[variant]
    assert key_table(config).to_ours(state).keys() == key_table(config).to_ours(bare).keys()
    seen = recognise(state)
    assert seen == replace(config, perturbation=None)  # which leaves no trace in the weights


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_key_of_the_teacher_has_its_place(name):
    import torch

    state = shapes("robusttok", name)
    theirs = {key: value for key, value in state.items() if key.startswith("semantic_model.")}
    with torch.device("meta"):
        teacher = ViTTeacher.from_state(theirs, "semantic_model.")
    known = {key for key in teacher.weights() if key.startswith("vit.")}
    assert len(known) == len(theirs)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_key_of_the_generators_has_its_place(name):
    state, variant = shapes("robusttok", name), GENERATORS[name]
    check("robusttok", variant, state, "generator")
    assert rar.recognise(state) == rar.VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("robusttok")) <= set(TOKENIZERS) | set(GENERATORS)
