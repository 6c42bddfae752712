"""Every tiny variant gives the numbers on file."""

import copy
import json

import pytest

from tests.golden import FOLDER, compare, measure, slugs, tiny_variants

CASES = [(slug, name) for slug in slugs() for name in tiny_variants(slug)]


@pytest.mark.parametrize(("slug", "name"), CASES, ids=[name for _, name in CASES])
def test_golden_numbers(slug, name):
    path = FOLDER / f"{slug}.json"
    assert path.exists(), f"no golden numbers of {slug}: `make golden` writes them once parity has passed"
    known = json.loads(path.read_text())
    assert set(known) == set(tiny_variants(slug))
    assert compare(measure(name), known[name]) == []


def test_a_small_change_is_seen():
    known = json.loads((FOLDER / "vqgan.json").read_text())["vqgan-tiny"]
    for change in (("encoder", "first", 3), ("pixels", "mean", None), ("tokens", "first", 1)):
        stage, key, index = change
        moved = copy.deepcopy(known)
        if index is None:
            moved[stage][key] *= 1.001
        elif stage == "tokens":
            moved[stage][key][index] += 1
        else:
            moved[stage][key][index] += 2e-4 * known[stage]["std"]
        assert compare(moved, known)
