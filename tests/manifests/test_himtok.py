"""The published HiMTok at full size: every key has its place, sizes are told from shapes."""

from tests.manifests.manifest import check, names, shapes
from vistok.tokenizers.himtok import VARIANTS, recognise


def test_every_key_has_its_place():
    state = shapes("himtok", "himtok-large")
    check("himtok", "himtok-l-32", state)
    assert recognise(state) == VARIANTS["himtok-l-32"]
    assert names("himtok") in ([], ["himtok-large"])
