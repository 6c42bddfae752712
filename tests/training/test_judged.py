"""Runs with judges, with several models, and with what is laid over a model's modules: numbers, logs, resumption."""

import json
import signal
import subprocess
import time

import pytest
import torch

import vistok
from tests.training.test_trainer import (  # noqa: F401
    ROOT,
    command,
    environment,
    exact,
    interrupted,
    photos,
    rows,
    same,
    write_recipe,
)
from vistok.errors import ConfigError
from vistok.training import checkpoint
from vistok.training.recipe import check
from vistok.training.step import Step
from vistok.training.trainer import train


def make(model="vqgan-tiny", size=32, **sections):
    base = {
        "model": {"name": model} if isinstance(model, str) else model,
        "data": {"size": size, "validation": 2},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 8, "batch_size": 4, "log_every": 2, "checkpoint_every": 3, "validate_every": 4,
                  "sample_every": 0, "tensorboard": False} | sections.pop("train", {}),
    }  # fmt: skip
    return check(base | sections, "test")


GAN = {
    "perceptual": {"name": "steerable"},
    "adversary": {
        "discriminator": {"name": "patchgan", "width": 8, "layers": 2},
        "start": 2,
        "lecam": 0.01,
        "optimizer": {"lr": 2e-3, "warmup": 2},
    },
    "loss": {"perceptual": 0.5},
}


@pytest.mark.parametrize(
    "train_section",
    [{}, {"accumulate": 2, "precision": "bf16"}, {"precision": "fp16"}],
    ids=["plain", "accumulated", "fp16"],
)
def test_a_judged_run_resumed_after_kills_ends_in_the_same_bits(train_section, photos, tmp_path, monkeypatch):  # noqa: F811
    recipe = make(**GAN, train=train_section)
    train(recipe, photos, tmp_path / "whole")
    interrupted(recipe, photos, tmp_path / "killed", [1, 4, 7], monkeypatch)
    assert same(exact(tmp_path / "whole"), exact(tmp_path / "killed"))
    log = rows(tmp_path / "whole" / "log.csv")
    assert float(log[0]["perceptual"]) > 0
    assert log[0]["logits_real"] == ""  # before its start
    for row in log[1:]:
        assert 0 <= float(row["discriminator_accuracy"]) <= 1
        assert all(
            row[name] for name in ("logits_fake", "discriminator_loss", "adaptive_weight", "lecam", "adversarial")
        )
    left = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    assert b"discriminator" not in left


def test_a_process_killed_with_9_in_a_run_with_everything_resumes_to_the_same_bits(photos, tmp_path):  # noqa: F811
    section = {"steps": 24, "checkpoint_every": 4, "accumulate": 2, "precision": "bf16", "best": "psnr", "ema": 0.9}
    recipe = make(**GAN, train=section | {"activation_checkpointing": True, "threads": 1})
    run = tmp_path / "killed"
    words = command(write_recipe(tmp_path / "recipe.yaml", recipe), photos, run)
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 240
    while len(checkpoint.steps_in(run / "checkpoints")) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < checkpoint.steps_in(run / "checkpoints")[-1] < 24
    train(recipe, photos, run, resume=True)
    train(recipe, photos, tmp_path / "whole")
    assert same(exact(run), exact(tmp_path / "whole"))
    assert (run / "codebooks.csv").read_text() == (tmp_path / "whole" / "codebooks.csv").read_text()
    assert (run / "best" / "best.json").read_text() == (tmp_path / "whole" / "best" / "best.json").read_text()


def test_the_discriminator_learns_to_tell_and_the_model_does_not_own_it(photos, tmp_path):  # noqa: F811
    adversary = GAN["adversary"] | {"start": 0, "weight": 0.0, "lecam": None, "optimizer": {"lr": 0.01}}
    train(make(adversary=adversary, train={"steps": 30}), photos, tmp_path / "run")
    log = rows(tmp_path / "run" / "log.csv")
    assert float(log[-1]["discriminator_loss"]) < 0.7 * float(log[0]["discriminator_loss"])
    alone = train(make(train={"steps": 30}), photos, tmp_path / "alone")
    first, second = (vistok.load(str(path)) for path in (tmp_path / "run" / "model", alone))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)  # at weight 0 it has no say


def test_the_model_takes_one_turn_of_three_and_the_discriminator_the_others(photos, tmp_path, monkeypatch):  # noqa: F811
    turns = []
    judges_turn, models_turn = Step._judge, Step._clip

    def judged(self, seen, step):
        turns.append("discriminator")
        judges_turn(self, seen, step)

    def clipped(self, parameters, section, norm):
        if parameters is self.parameters:
            turns.append("model")
        models_turn(self, parameters, section, norm)

    monkeypatch.setattr(Step, "_judge", judged)
    monkeypatch.setattr(Step, "_clip", clipped)
    recipe = make(**GAN | {"adversary": GAN["adversary"] | {"model_every": 3}}, train={"steps": 9, "log_every": 3})
    train(recipe, photos, tmp_path / "whole")
    assert turns == ["model"] * 3 + ["discriminator"] * 2 + ["model"] + ["discriminator"] * 2 + ["model"]
    interrupted(recipe, photos, tmp_path / "killed", [1, 4, 7], monkeypatch)
    assert same(exact(tmp_path / "whole"), exact(tmp_path / "killed"))
    log = rows(tmp_path / "whole" / "log.csv")
    assert all(row["discriminator_loss"] and row["adaptive_weight"] for row in log[1:])
    assert all(float(row["grad_norm"]) > 0 for row in log)


def test_turns_are_part_of_a_recipe_only_where_they_differ():
    plain, turns = (make(**GAN | {"adversary": GAN["adversary"] | {"model_every": n}}) for n in (1, 9))
    assert "model_every" not in plain.plain()["adversary"]
    assert turns.plain()["adversary"]["model_every"] == 9


def test_a_judge_that_wants_other_sizes_or_has_no_place_is_refused(photos, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="not judged"):
        train(make("strata-tiny", size=64, perceptual={"name": "steerable"}), photos, tmp_path / "one")
    with pytest.raises(ConfigError, match="clip_adversary"):
        train(make(clip_adversary={"discriminator": {"name": "patchgan"}}), photos, tmp_path / "two")
    with pytest.raises(ConfigError, match="needs a name"):
        make(adversary={"discriminator": {"width": 8}})
    with pytest.raises(ConfigError, match=r"adversary\.optimizer"):
        train(make(adversary=GAN["adversary"] | {"optimizer": {"rl": 1}}), photos, tmp_path / "three")
    with pytest.raises(vistok.errors.VistokError, match="patchgan"):
        train(make(adversary={"discriminator": {"name": "patchgn"}}), photos, tmp_path / "four")


TITOK = {
    "model": {"name": "titok-tiny", "start_from": "proxy"},
    "stages": [
        {"name": "teacher", "model": {"name": "vqgan-maskgit-tiny", "codebook_size": 32, "code_dim": 16,
         "cnn": {"width": 32, "multipliers": [1, 1, 2, 2], "blocks": 1, "latent_dim": 16, "style": "maskgit"}},
         "train": {"steps": 4}},
        {"name": "proxy", "model": {"name": "titok-tiny-proxy"}, "teachers": {"codes": "teacher"},
         "train": {"steps": 5}},
        {"name": "pixels", "teachers": {"codes": "teacher"}, "freeze": ["encoder", "quantizer"],
         "perceptual": {"name": "steerable"}, "adversary": {"discriminator": {"name": "titok", "width": 32}},
         "train": {"steps": 3}},
    ],
}  # fmt: skip


def test_stages_of_several_models_hand_their_weights_on(photos, tmp_path, monkeypatch):  # noqa: F811
    recipe = make(**TITOK, train={"validate_every": 0})
    train(recipe, photos, tmp_path / "whole")
    interrupted(recipe, photos, tmp_path / "killed", [2, 4, 6, 9, 11], monkeypatch)
    assert same(exact(tmp_path / "whole"), exact(tmp_path / "killed"))
    stages = {name: vistok.load(str(tmp_path / "whole" / "stages" / name)) for name in ("teacher", "proxy", "pixels")}
    final = vistok.load(str(tmp_path / "whole" / "model"))
    assert torch.equal(final.encoder.project.weight, stages["proxy"].encoder.project.weight)  # frozen since
    assert torch.equal(final.decoder.codebook, stages["pixels"].decoder.codebook)
    difference = (final.decoder.pixels.last_layer - stages["teacher"].decoder.cnn.last_layer).abs().max()
    assert 0 < difference < 0.02  # three steps from the teacher's
    assert final.decode(final.encode(torch.rand(1, 3, 32, 32))).shape == (1, 3, 32, 32)


def test_stages_that_do_not_fit(photos, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="no earlier stage 'prox'; did you mean 'proxy'"):
        make(**TITOK | {"model": {"name": "titok-tiny", "start_from": "prox"}}).resolved()
    twice = [{"name": "a", "train": {"steps": 1}}, {"name": "a", "train": {"steps": 1}}]
    with pytest.raises(ConfigError, match="earlier stage"):
        make(stages=twice).resolved()
    with pytest.raises(ConfigError, match="learns from no teacher"):
        train(make(teachers={"codes": "vqgan-tiny"}, model="strata-tiny", size=64), photos, tmp_path / "a")
    wrong = [{"name": "teacher", "model": {"name": "vqgan-tiny"}, "train": {"steps": 1}}, *TITOK["stages"][1:]]
    with pytest.raises(ConfigError, match="predicts 16 of 32"):
        train(make(**TITOK | {"stages": wrong}), photos, tmp_path / "b")


def test_recomputed_blocks_give_the_same_numbers(photos, tmp_path):  # noqa: F811
    left = []
    for recomputes in (False, True):
        section = {"steps": 3, "activation_checkpointing": recomputes, "ema": None}
        for name in ("vqgan-tiny", "titok-tiny-vq"):
            path = train(make(name, train=section), photos, tmp_path / f"{name}-{recomputes}")
            left.append(vistok.load(str(path)).state_dict())
    for plain, recomputed in zip(left[:2], left[2:], strict=True):
        assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.slow
def test_a_compiled_model_trains_and_its_file_knows_nothing_of_it(photos, tmp_path):  # noqa: F811
    paths = [
        train(
            make("titok-tiny-vq", train={"steps": 4, "log_every": 1, "compile": compiles}),
            photos,
            tmp_path / str(compiles),
        )
        for compiles in (False, True)
    ]
    plain, compiled = (vistok.load(str(path)).state_dict() for path in paths)
    assert plain.keys() == compiled.keys()
    # weights whose gradient is all rounding move by the learning rate either way, so it is the losses that agree
    told = [[float(row["loss"]) for row in rows(path.parent / "log.csv")] for path in paths]
    assert len(told[0]) == 4
    assert told[1] == pytest.approx(told[0], rel=2e-3)


def test_a_machine_without_a_compiler_is_told(photos, tmp_path, monkeypatch):  # noqa: F811
    def missing(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(ConfigError, match=r"compiler.*train\.compile=false"):
        train(make(train={"compile": True}), photos, tmp_path / "run")


def test_the_best_model_is_kept(photos, tmp_path):  # noqa: F811
    section = {"steps": 12, "validate_every": 2, "best": "psnr", "ema": None}
    train(make(optimizer={"lr": 3e-3}, train=section), photos, tmp_path / "run")
    scores = {int(row["step"]): float(row["psnr"]) for row in rows(tmp_path / "run" / "validation.csv")}
    facts = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert facts == {"step": max(scores, key=scores.get), "psnr": max(scores.values())}
    assert vistok.load(str(tmp_path / "run" / "best")).system == "vqgan"
    with pytest.raises(ConfigError, match="no 'pnsr'; did you mean 'psnr'"):
        train(make(train=section | {"best": "pnsr"}), photos, tmp_path / "typo")
