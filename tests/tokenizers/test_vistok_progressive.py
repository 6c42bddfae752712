"""vistok-progressive: planes and their prefixes, an embedded stream that decodes from any cut, exact integers."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vistok
from tests.golden import draw_weights
from vistok.compressed import compress, decompress, decompress_part, pack, peek, unpack
from vistok.errors import FormatError, InputError, MismatchError
from vistok.layout import Canvas
from vistok.metrics.psnr import psnr
from vistok.tokenizers._progressive_coding import P_ONE, S_ONE, STEEPEST, tables
from vistok.tokenizers._progressive_prior import TOP, UNIT, ExactConv, on_grid, round_weights, sizes_table
from vistok.tokens import Tokens


def photographs(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth pictures with some edges, uint8 (n, 3, size, size)."""
    rng = torch.Generator().manual_seed(seed)
    base = F.interpolate(torch.rand(count, 3, 5, 5, generator=rng), size=(size, size), mode="bicubic")
    edges = F.interpolate(torch.rand(count, 1, 4, 4, generator=rng), size=(size, size), mode="nearest")
    noise = 0.03 * torch.randn(base.shape, generator=rng)
    return ((0.7 * base + 0.3 * edges + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def trained(steps: int = 30):
    """A tiny model after a few steps of both stages."""
    torch.manual_seed(0)
    model = vistok.create("vistok-progressive-tiny")
    pictures = photographs(32).float() / 255
    rng = torch.Generator().manual_seed(0)
    model.initialise(iter([{"pixels": pictures}] * 2), rng)
    model.train()
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        terms = model.loss({"pixels": pictures[step % 4 * 8 :][:8]}, step, rng)
        adam.zero_grad()
        sum(terms.values()).backward()
        adam.step()
    return model.eval()


@pytest.fixture(scope="module")
def tok():
    return trained()


@pytest.fixture(scope="module")
def picture():
    return photographs(1, 80, seed=5)[:, :, :70]  # 70 x 80: padded to 80 x 80


def test_layout(tok):
    spec = tok.spec.at((96, 64))
    assert [segment.shape for segment in spec.segments] == [(6, 4)] * 6
    assert spec.segments[0].codebooks == (3,) * 48
    assert list(spec.prefixes) == [24 * plane for plane in range(1, 7)]


def test_codes_are_the_coefficients_in_whole_steps(tok):
    pixels = photographs(2)
    tokens = tok.encode(pixels)
    assert int(tokens.codes.min()) == 0
    assert int(tokens.codes.max()) == 2
    planes = [part.transpose(1, 2).unflatten(2, (4, 4)) for part in tokens.codes.split(16, 1)]
    with torch.no_grad():
        latent = tok.latent(pixels)
    for count in (1, 3, 6):
        expected = (latent / tok.config.step(count - 1)).trunc().int()
        assert torch.equal(tok.quantizer.decode(planes[:count]), expected)


def test_quality_rises_with_every_plane(tok, picture):
    tokens = tok.encode(picture)
    quality = [float(psnr(tok.decode(tokens.prefix(k), dtype=torch.uint8), picture)[0]) for k in spec_of(tok).prefixes]
    assert quality == sorted(quality)
    assert quality[-1] > quality[0] + 6


def test_vectors_of_a_prefix_sum_to_its_latent(tok, picture):
    tokens = tok.encode(picture)
    vectors = tok.embed(tokens).unflatten(1, (6, 25))
    step = tok.config.step(3)
    index = (tok.latent(F.pad(picture.float() / 255, (0, 0, 0, 10), mode="replicate")) / step).trunc()
    latent = tok.quantizer.value(index, step).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vectors[:, :4].sum(1), latent, atol=1e-2, rtol=1e-4)
    part = unpack(tok, compress(tok, picture)[:60], partial=True)
    assert bool((tok.embed(part)[:, -25:][part.codes[:, -25:] < 0] == 0).all())


def test_the_whole_model_in_one_call(tok):
    pixels = photographs(2)
    with torch.no_grad():
        whole = tok(pixels.float() / 255).clamp(0, 1)
    torch.testing.assert_close(tok.decode(tok.encode(pixels)), whole, atol=1e-4, rtol=0)


def spec_of(tok):
    return tok.spec.at((80, 80))


def test_windows_equal_the_whole(tok, monkeypatch):
    image = F.interpolate(torch.rand(1, 3, 9, 9), size=(256, 320), mode="bicubic").clamp(0, 1)
    whole = tok.encode(image)
    pixels = tok.decode(whole)
    monkeypatch.setattr(type(tok), "window", 4)
    parts = tok.encode(image)
    assert (parts.codes == whole.codes).float().mean() > 0.9999  # float rounding may move a tie
    torch.testing.assert_close(tok.decode(whole), pixels, atol=1e-5, rtol=0)


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_file_of_all_planes_gives_the_tokens_back(tok, picture):
    tokens = tok.encode(picture)
    for length in spec_of(tok).prefixes:
        data = pack(tok, tokens.prefix(length))
        assert torch.equal(unpack(tok, data).codes, tokens.codes[:, :length])
        assert compress(tok, picture, length=length) == data
        assert torch.equal(decompress(tok, data), tok.decode(tokens.prefix(length), dtype=torch.uint8))


def test_budgets_are_kept_and_used(tok, picture):
    full = len(compress(tok, picture))
    for budget in [*range(24, full, max(1, full // 40)), full, full + 1]:
        data = compress(tok, picture, bytes=budget)
        assert len(data) == budget or (budget >= full and len(data) >= full - 2)
        state = unpack(tok, data)
        difference = decompress(tok, data).int() - tok.decode(state, dtype=torch.uint8).int()
        assert int(difference.abs().max()) <= 1  # float rounding may move a level
    small, large = (compress(tok, picture, bytes=size) for size in (100, 200))
    assert small[:-2] == large[:98]  # all but the checksum
    bits = compress(tok, picture, bpp=0.5)
    assert len(bits) <= 0.5 * 70 * 80 / 8
    with pytest.raises(InputError, match="shortest file"):
        compress(tok, picture, bytes=9)
    assert decompress(tok, compress(tok, picture, bytes=10)).shape == picture.shape


def test_psnr_targets_are_reached_with_few_bytes(tok, picture):
    sizes = []
    for target in (20.0, 24.0, 28.0):
        data = compress(tok, picture, psnr=target)
        assert float(psnr(decompress(tok, data), picture)[0]) >= target
        shorter = compress(tok, picture, bytes=int(len(data) * 0.95))
        assert float(psnr(decompress(tok, shorter), picture)[0]) < target + 0.2
        sizes.append(len(data))
    assert sizes == sorted(sizes)
    with pytest.raises(InputError, match="reaches"):
        compress(tok, picture, psnr=90.0)


def test_every_prefix_of_a_file_decodes_and_more_bytes_are_better(tok, picture):
    data = compress(tok, picture)
    header = peek(data).bytes
    whole = unpack(tok, data).codes
    quality = []
    for end in range(header, len(data)):
        tokens = unpack(tok, data[:end], partial=True)
        codes = tokens.codes
        sent = codes >= 0
        assert torch.equal(codes[sent], whole[:, : codes.shape[1]][sent])  # what is there is right
        if end % 16 == 0:
            pixels = decompress(tok, data[:end], partial=True)
            quality.append(float(psnr(pixels, picture)[0]))
    falls = [before - after for before, after in pairwise(quality)]
    assert max(falls) < 0.1
    assert quality[-1] > quality[0] + 6
    pixels, complete = decompress_part(tok, data)
    assert complete
    assert torch.equal(pixels, decompress(tok, data))
    assert not decompress_part(tok, data[:-1])[1]


def test_a_cut_file_is_refused_unless_it_is_said(tok, picture):
    data = compress(tok, picture)
    with pytest.raises(FormatError, match="partial"):
        decompress(tok, data[:-1])
    with pytest.raises(FormatError, match="not even its header"):
        decompress(tok, data[:6], partial=True)


def test_a_changed_byte_is_noticed(tok, picture):
    data = compress(tok, picture)
    for place in range(2, len(data), 7):
        changed = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        with pytest.raises((FormatError, MismatchError)):
            decompress(tok, changed)


def test_a_prior_that_computes_otherwise_is_noticed(tok, picture):
    data = compress(tok, picture)
    other = trained()
    other.remember_fingerprint(tok.fingerprint)
    assert torch.equal(decompress(other, data), decompress(tok, data))
    with torch.no_grad():
        other.prior.offset[2:] += 1 / UNIT  # the smallest difference there can be
    other.remember_fingerprint(tok.fingerprint)
    with pytest.raises((FormatError, MismatchError)):
        decompress(other, data)


def test_sizes_from_one_pixel_on(tok):
    for size in ((1, 1), (16, 16), (17, 40)):
        image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        data = compress(tok, image)
        assert decompress(tok, data).shape == image.shape
        assert decompress(tok, data[: peek(data).bytes], partial=True).shape == image.shape


# -- exact integers --------------------------------------------------------------------------------------------------


def test_a_convolution_is_exact_in_any_order():
    torch.manual_seed(0)
    conv = ExactConv(192, 24, 3).eval()
    x = on_grid(torch.rand(2, 192, 9, 7) * TOP)
    with torch.no_grad():
        ours = conv(x) - conv.bias[:, None, None]
        exact = F.conv2d(x.double(), round_weights(conv.weight).double(), padding=1)
        order = torch.randperm(192)
        shuffled = ExactConv(192, 24, 3).eval()
        shuffled.weight.copy_(conv.weight[:, order])
        assert torch.equal(ours.double(), exact)
        assert torch.equal(shuffled(x[:, order]), ours)
    close = (exact - F.conv2d(x, conv.weight, padding=1).double()).abs().max() / exact.abs().max()
    assert close < 0.02


def test_rounded_weights_keep_sums_exact_and_stay():
    heavy = torch.ones(3, 4000) * torch.tensor([1e-6, 1.0, 77.0])[:, None]
    rounded = round_weights(heavy)
    unit = torch.stack([row[row > 0].min() for row in rounded.abs()])
    assert bool(((rounded / unit[:, None]).abs().sum(1) <= (1 << 24) / 255).all())
    weights = torch.randn(16, 64, 3, 3)
    once = round_weights(weights)
    assert torch.equal(round_weights(once), once)
    assert torch.equal(once.half().float(), once)


def test_probabilities_are_those_of_the_logits():
    for table, one in zip(tables(), (P_ONE, S_ONE), strict=True):
        logits = torch.arange(-STEEPEST, STEEPEST + 1)
        expected = ((logits / UNIT).double().sigmoid() * one).round().clamp(1, one - 1)
        found = torch.from_numpy(table[logits.numpy()]).double()
        assert (found - expected).abs().max() <= 1
        assert torch.equal(found + found.flip(0), torch.full_like(found, one))


def test_files_are_the_same_for_every_batch_and_number_of_threads(tok, tmp_path):
    """Written with one thread, two, and after the pictures went through the encoder in a batch."""
    tok.save(tmp_path / "model")
    pictures = photographs(3, 64, seed=9)
    batched = tok.encode(pictures)
    script = (
        "import sys, torch, vistok; from vistok.compressed import pack; from vistok.tokens import Tokens\n"
        "torch.set_num_threads(int(sys.argv[1])); torch.set_float32_matmul_precision(sys.argv[2])\n"
        f"tok = vistok.load({str(tmp_path / 'model')!r})\n"
        f"tokens = Tokens.load({str(tmp_path / 'tokens.vtok')!r})\n"
        "sys.stdout.write(pack(tok, tokens).hex())"
    )
    batched[1].save(tmp_path / "tokens.vtok")
    found = set()
    for threads, precision in (("1", "highest"), ("2", "highest"), ("3", "medium")):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", script, threads, precision]
        found.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert found == {pack(tok, batched[1]).hex()}
    assert torch.equal(unpack(tok, bytes.fromhex(found.pop())).codes, batched[1].codes)


def ruled():
    """A tiny model whose weights come from numpy by a rule that never changes."""
    model = vistok.create("vistok-progressive-tiny")
    draw_weights(model)
    model.prior.table.copy_(sizes_table())
    return model


def test_a_file_of_version_4_keeps_decoding_to_the_same_coefficients():
    """Written once, committed: whatever the machine, its integers are those of the writer."""
    model = ruled()
    random = np.random.RandomState(4)
    spread = (900 * np.exp(-np.arange(48) / 6))[:, None, None]
    latent = torch.from_numpy((random.laplace(size=(1, 48, 5, 7)) * spread).astype(np.float32))
    planes = model.quantizer.encode(latent)
    codes = torch.cat([plane.flatten(2).transpose(1, 2) for plane in planes], 1).long()
    spec = model.spec.at((80, 112))
    tokens = Tokens(spec.segments, codes, None, None, (Canvas((75, 110), padding=(0, 0, 2, 5)),), model.source)
    data = (SAMPLES / "progressive-v4.vtk").read_bytes()
    found = unpack(model, data)
    assert hashlib.sha256(found.codes.numpy().astype("<i8").tobytes()).hexdigest() == SAMPLE_CODES
    assert torch.equal(found.codes, codes)
    assert pack(model, tokens) == data
    part = unpack(model, data[:200], partial=True).codes
    assert hashlib.sha256(part.numpy().astype("<i8").tobytes()).hexdigest() == PART_CODES


SAMPLES = Path(__file__).parents[1] / "samples"
SAMPLE_CODES = "2c77d274aa59dcd960d5622603a25eaa28390a7d73cc974f42a6db606a75c236"
PART_CODES = "78d2a75c31cd8ef048e0e7e802119b6a7927e92f028a39a98e8570b766389330"


# -- training --------------------------------------------------------------------------------------------------------


def test_stages_train_what_is_not_frozen():
    torch.manual_seed(0)
    model = vistok.create("vistok-progressive-tiny").train()
    batch = {"pixels": photographs(4).float() / 255}
    model.initialise(iter([batch] * 20), torch.Generator().manual_seed(0))
    for frozen, terms in ((model.decoder, {"bits", "refine", "guess"}), (model.prior, {"decoder"})):
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True)
        frozen.requires_grad_(False)
        loss = model.loss(batch, 0, torch.Generator().manual_seed(0))
        assert set(loss) == terms
        sum(loss.values()).backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def test_training_lowers_the_cost_of_files(tok, picture):
    fresh = trained(0)
    assert len(compress(tok, picture)) < len(compress(fresh, picture))


# -- large pictures --------------------------------------------------------------------------------------------------

LARGE = """
import resource, sys, torch, vistok
import torch.nn.functional as F
from vistok.compressed import compress, decompress
torch.manual_seed(0)
torch.set_num_threads(1)
tok = vistok.create("vistok-progressive").eval()
tok.prior.offset.data[:, : tok.config.channels] = -4.0  # zeros are expected, as a trained prior does
coarse = F.interpolate(torch.rand(1, 3, 300, 400), size=(3000, 4000), mode="bicubic").mul_(255).clamp_(0, 255)
pixels = coarse.to(torch.uint8)
del coarse
data = compress(tok, pixels, bpp=0.1)
back = decompress(tok, data)
assert back.shape == pixels.shape
assert len(data) == 150_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux alone")
def test_twelve_megapixels_take_less_than_two_gigabytes():
    """The whole process with its libraries, from pixels to the file and back."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, env=environment, timeout=1200
    )
    assert int(done.stdout) < 2 * 1024**2
