"""VTBench's preprocessing and metrics are its scripts'."""

import numpy as np
import torch
from PIL import Image

from tests.parity.cases import Case, assert_close, parametrize
from vistok.evaluation.vtbench import Preprocess, SetPsnr, stretched, vtbench_ssim
from vistok.metrics.text import character_error_rate, vtbench_word_error_rate

NAMES = {"target_image_size": "target"}


def preprocess(options) -> Preprocess:
    named = {NAMES.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return Preprocess(**named)


@parametrize("vtbench", kinds=("preprocess-metrics",))
def test_preprocessing_and_metrics(case: Case) -> None:
    io, config = case.io, case.config
    count = sum(name.startswith("src_") for name in io)
    sources, rebuilt = ([Image.fromarray(io[f"{name}_{i}"].numpy()) for i in range(count)] for name in ("src", "rec"))
    for number, options in enumerate(config["options"]):
        for place, image in enumerate(sources):
            name = f"tensor_{place}_opt{number}"
            assert_close(preprocess(options)(image), io[name], name=name)
    for standardize, name in ((True, "to_pil_out"), (False, "to_pil_out_nonstd")):
        picture = Preprocess(standardize=standardize).to_picture(io["to_pil_in"])
        assert torch.equal(torch.from_numpy(np.asarray(picture).copy()), io[name])

    side = config["eval_image_size"]
    originals, recs = (torch.stack([stretched(image, side) for image in part]) for part in (sources, rebuilt))
    assert_close(originals, io["resized_original"], name="resized originals")
    assert_close(recs, io["resized_reconstruction"], name="resized reconstructions")
    psnr, batches = (
        SetPsnr(),
        list(zip(recs.split(config["batches"]), originals.split(config["batches"]), strict=True)),
    )
    for pair in batches:
        psnr.update(*pair)
    pairs = [(text["target"], text["pred"]) for text in config["texts"]]
    cer, wer = character_error_rate(pairs), vtbench_word_error_rate(pairs)
    found = {
        "psnr": psnr.value,
        "ssim": vtbench_ssim(batches),
        "cer": cer.value,
        "cer_total_errors": cer.errors,
        "cer_total_chars": cer.length,
        "wer_as_released": wer.value,
        "wer_total_errors": wer.errors,
        "wer_total_words": wer.length,
    }
    for name, value in found.items():
        assert_close(torch.tensor(float(value)), io[name], name=name)
