"""The published DeiTs that were trained with ToMe: every key has its place, sizes are told from shapes."""

import pytest

from tests.manifests.manifest import check, names, shapes
from vistok.reducers.tome import VARIANTS, recognise

PUBLISHED = {"deit-small": "tome-deit-small", "deit-tiny": "tome-deit-tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_has_its_place(name):
    state, variant = shapes("tome", name), PUBLISHED[name]
    check("tome", variant, state)
    assert recognise(state) == VARIANTS[variant]


def test_no_manifest_is_forgotten():
    assert set(names("tome")) <= set(PUBLISHED)
