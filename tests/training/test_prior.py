"""The command that fits a prior: a model folder in, the same model with a prior out, and smaller files."""

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from tests import toy  # noqa: F401
from vistok.compressed import compress, peek, unpack
from vistok.errors import InputError
from vistok.training.prior import fit_tokenizer, main, order_by_likeness


@pytest.fixture
def photographs(tmp_path):
    folder, random = tmp_path / "photographs", np.random.RandomState(0)
    folder.mkdir()
    for number in range(12):
        small = random.randint(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(small).resize((160, 130), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_a_fitted_model_writes_smaller_files(photographs, tmp_path):
    torch.manual_seed(0)
    plain = vistok.create("strata-tiny")
    plain.save(tmp_path / "plain")
    words = [str(tmp_path / "plain"), str(photographs), "-o", str(tmp_path / "fitted"), "--epochs", "10", "--flip"]
    main(words)
    fitted = vistok.load(tmp_path / "fitted")
    assert fitted.config.prior == 32
    assert fitted.fingerprint != plain.fingerprint
    ours = dict(fitted.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in plain.named_parameters())
    picture = Image.open(photographs / "3.png")
    data = compress(fitted, picture)
    assert torch.equal(unpack(fitted, data).codes, plain.encode(picture).codes)
    payload = len(data) - peek(data).bytes
    assert payload < 0.9 * (len(compress(plain, picture)) - peek(data).bytes)
    main([str(tmp_path / "fitted"), *words[1:3], str(tmp_path / "again"), *words[4:]])  # fitted anew from the start
    assert vistok.load(tmp_path / "again").fingerprint == fitted.fingerprint


def test_a_tokenizer_without_a_prior_is_refused(photographs):
    with pytest.raises(InputError, match="toy has no prior"):
        fit_tokenizer(vistok.create("toy"), photographs)


@pytest.mark.parametrize(("count", "members"), [(64, 8), (50, 8), (7, 8)])
def test_alike_codes_share_a_group(count, members):
    values = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float()
    order = order_by_likeness(values[:, None], members)
    assert order.sort().values.tolist() == list(range(count))
    for group in values[order].split(members):
        assert group.max() - group.min() == len(group) - 1
