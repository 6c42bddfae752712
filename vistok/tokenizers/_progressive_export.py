"""The weights of vistok-progressive that ship: two trained parts in one small model folder.

    python -m vistok.tokenizers._progressive_export PRIOR_RUN/model DECODER_RUN/model [-o FOLDER] [--sample FILE]

    prior    convolutions rounded to the integers that coding uses, which half precision holds
    decoder  half precision
    both     transform, offsets and biases as they are

The folder's model writes the same streams as the prior did. `--sample` also writes a compressed picture and, beside it,
the hash of the codes that it must decode to on every machine (`FILE` with .json).
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from vistok import hub
from vistok.compressed import compress, unpack
from vistok.errors import InputError, MismatchError
from vistok.files import write_atomically
from vistok.folder import WEIGHTS, write_folder
from vistok.tokenizers._progressive_prior import ExactConv, round_weights
from vistok.tokenizers.vistok_progressive import SYSTEM, VistokProgressive

FOLDER = Path(__file__).parents[1] / "weights" / SYSTEM.slug
README = """---
library_name: vistok
license: apache-2.0
tags:
  - visual-tokenizer
  - image-compression
---

# vistok-progressive

The tokenizer that `vistok compress` uses: one embedded stream per photograph, which decodes from any of its first
bytes. The prior's weights are integers of 8 bits times a power of two, the decoder's are in half precision.

Trained by `vistok train vistok-progressive/paper` on photographs of ImageNet (research use). Code and weights:
Apache-2.0. What it is for, what it is not for, and what was measured: `docs/systems/vistok-progressive.md`.
"""


def joined(prior: VistokProgressive, decoder: VistokProgressive) -> VistokProgressive:
    """One model of two trained ones: `prior` with the other's decoder.

    Raises MismatchError unless both have one configuration and one transform.
    """
    if prior.config != decoder.config:
        raise MismatchError("prior and decoder have different configurations; train both with the same recipe")
    ours, theirs = (dict(model.encoder.named_buffers()) for model in (prior, decoder))
    if any(not torch.equal(ours[name], theirs[name]) for name in ours):
        raise MismatchError("prior and decoder were trained on different transforms; both start from the same pictures")
    prior.decoder.load_state_dict(decoder.decoder.state_dict())
    return prior.eval()


@torch.no_grad()
def shipped_state(model: VistokProgressive) -> dict[str, Tensor]:
    """The state dict as it is stored. Raises InputError where a rounded weight does not fit into half precision."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, part in model.named_modules():
        if isinstance(part, ExactConv):
            rounded = round_weights(part.weight.float())
            state[f"{name}.weight"] = rounded.half()
            if not torch.equal(state[f"{name}.weight"].float(), rounded):
                raise InputError(f"{name} has weights that half precision does not hold; train it with a lower rate")
    for name, _ in model.decoder.named_parameters():
        state[f"decoder.{name}"] = state[f"decoder.{name}"].half()
    return state


def export(prior: Path, decoder: Path, folder: Path) -> VistokProgressive:
    """Write the folder and give the model that is in it. Raises as `joined` and `shipped_state`."""
    found: list[VistokProgressive] = []
    for path in (prior, decoder):
        part = hub.load_folder(path)
        if not isinstance(part, VistokProgressive):
            raise MismatchError(f"{path} holds a {part.name}; expected a {SYSTEM.slug}")
        found.append(part)
    model = joined(*found)
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, shipped_state(model), model, model.config, model.name)
    write_atomically(folder / "README.md", README.encode())
    return hub.load_folder(folder).eval()  # type: ignore[return-value]


def write_sample(model: VistokProgressive, pixels: Tensor, file: Path, bpp: float = 0.15) -> None:
    """A compressed file of uint8 pixels (1, 3, H, W), and the hash of its codes beside it."""
    data = compress(model, pixels, bpp=bpp)
    facts = {"fingerprint": model.fingerprint, "bytes": len(data), "codes": codes_hash(model, data)}
    write_atomically(file, data)
    write_atomically(file.with_suffix(".json"), (json.dumps(facts, indent=1) + "\n").encode())


def codes_hash(model: VistokProgressive, data: bytes) -> str:
    """SHA-256 of the codes in a file, as little-endian 64-bit integers."""
    codes = unpack(model, data).codes
    assert codes is not None
    return hashlib.sha256(codes.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def main() -> None:
    """Write the folder, and the sample where asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prior", type=Path, help="the model folder of a run that trained the prior")
    parser.add_argument("decoder", type=Path, help="the same of the decoder")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="the folder; the package's own if left out")
    parser.add_argument("--sample", type=Path, help="a .vtk file to write: scikit-image's coffee, compressed")
    options = parser.parse_args()
    model = export(options.prior, options.decoder, options.output)
    print(f"{options.output}: {(options.output / WEIGHTS).stat().st_size / 1e6:.2f} MB, {model.fingerprint}")
    if options.sample:
        from skimage import data

        write_sample(model, torch.from_numpy(data.coffee()).permute(2, 0, 1)[None], options.sample)
        print(f"{options.sample}: {options.sample.stat().st_size} bytes")


if __name__ == "__main__":
    main()
