"""The quantizers give their authors' numbers: outputs, codes, losses and gradients of every case."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch import Tensor

from tests.parity.cases import Case, assert_close, parametrize
from vistok.quantize import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EntropyTerm,
    MultiScaleVectorQuantizer,
    Quantizer,
    ResidualVQ,
    SimVQ,
    VectorQuantizer,
    fsq,
    ibq,
    lfq,
    multiscale,
    residual,
    rotate,
    simvq,
    vq,
)


def check(case: Case, **actual: Tensor) -> None:
    """Every given tensor against the one of its name in the case; what the case lacks is an error."""
    for name, tensor in actual.items():
        assert_close(tensor, case.io[name], name=f"{case.name}/{name}")


def covered(case: Case, *names: str) -> None:
    """Every tensor of the case was an input or was compared."""
    assert set(case.io) == set(names), f"not compared: {sorted(set(case.io) ^ set(names))}"


def to_rows(x: Tensor) -> Tensor:
    return rearrange(x, "b d h w -> b (h w) d")


def like_map(x: Tensor, shape: torch.Size) -> Tensor:
    return rearrange(x, "b (h w) d -> b d h w", h=shape[2], w=shape[3])


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def load(quantizer: Quantizer, state: dict[str, Tensor]) -> None:
    missing, unexpected = quantizer.load_state_dict(state, strict=True)
    assert not missing
    assert not unexpected


# --- VQ ---------------------------------------------------------------------------------------------------------------


def check_vq_ema(case: Case) -> None:
    c, io = case.config, case.io
    quantizer = VectorQuantizer(
        c["dim"],
        c["codebook_size"],
        metric="cosine" if c["use_cosine_sim"] else "l2",
        learning="ema",
        estimator="rotation" if c.get("rotation_trick") else "straight-through",
        commitment=c["commitment_weight"],
        decay=c["decay"],
        eps=c["eps"],
        restart_below=c.get("threshold_ema_dead_code", 0),
    )
    state = vq.authors_state(case.weights)
    load(quantizer, state | ({"steps": torch.zeros((), dtype=torch.long)} if quantizer.restart_below else {}))
    names = ["eval_x", "eval_indices", "eval_quantized"]
    steps = sorted(
        int(name[1:-2]) for name in io if name.startswith("s") and name.endswith("_x") and name[1:-2].isdigit()
    )
    assert steps
    for step in steps:
        x = leaf(io[f"s{step}_x"])
        out = quantizer(x)
        loss = total(out.losses)
        ((out.vectors * io[f"s{step}_grad_weight"]).sum() + loss).backward()
        outputs = {"quantized": out.vectors, "indices": out.codes, "loss": loss, "grad_x": x.grad}
        buffers = {"after_embed": quantizer.codebook[None], "after_embed_avg": quantizer.sums[None]}
        buffers["after_cluster_size"] = quantizer.counts[None]
        for name, tensor in (outputs | buffers).items():
            assert_close(tensor, io[f"s{step}_{name}"], name=f"{case.name}/s{step}_{name}")
        names += [f"s{step}_{name}" for name in ("x", "grad_weight", *outputs, *buffers)]
    quantizer.eval()
    out = quantizer(io["eval_x"])
    check(case, eval_quantized=out.vectors, eval_indices=out.codes)
    check(case, eval_quantized=quantizer.decode(io["eval_indices"]), eval_indices=quantizer.encode(io["eval_x"]))
    covered(case, *names)


def check_vq_taming(case: Case) -> None:
    c, io = case.config, case.io
    weights = (1.0, c["beta"]) if c["legacy"] else (c["beta"], 1.0)
    quantizer = VectorQuantizer(c["e_dim"], c["n_e"], commitment=weights[0], codebook_weight=weights[1])
    load(quantizer, vq.authors_state(case.weights))
    z = leaf(io["z"])
    out = quantizer(to_rows(z))
    quantized, loss = like_map(out.vectors, z.shape), total(out.losses)
    ((quantized * io["grad_weight"]).sum() + loss).backward()
    check(case, quantized=quantized, loss=loss, grad_z=z.grad, grad_codebook=quantizer.codebook.grad)
    assert_close(out.codes.flatten(), io["indices"].flatten(), name="indices")
    covered(case, "z", "grad_weight", "quantized", "loss", "grad_z", "grad_codebook", "indices")


def check_vq_l2_entropy(case: Case) -> None:
    c, io = case.config, case.io
    ratio = c["entropy_loss_ratio"]
    quantizer = VectorQuantizer(
        c["e_dim"],
        c["n_e"],
        metric="cosine" if c["l2_norm"] else "l2",
        commitment=c["beta"],
        entropy=EntropyTerm(weight=ratio, temperature=c["entropy_temperature"]) if ratio else None,
    )
    load(quantizer, vq.authors_state(case.weights))
    z = leaf(io["z"])
    out = quantizer(to_rows(z))
    quantized = like_map(out.vectors, z.shape)
    ((quantized * io["grad_weight"]).sum() + total(out.losses)).backward()
    check(case, quantized=quantized, grad_z=z.grad, grad_codebook=quantizer.codebook.grad)
    entropy = out.losses.get("entropy", torch.zeros(()))
    check(case, vq_loss=out.losses["codebook"], commit_loss=out.losses["commitment"], entropy_loss=entropy)
    assert_close(out.codes.flatten(), io["indices"].flatten(), name="indices")
    losses = ("vq_loss", "commit_loss", "entropy_loss")
    covered(case, "z", "grad_weight", "quantized", "grad_z", "grad_codebook", "indices", *losses)


def check_rotation_trick(case: Case) -> None:
    src = leaf(case.io["src"])
    out = rotate(src, case.io["tgt"])
    (out * case.io["grad_weight"]).sum().backward()
    check(case, output=out, grad_src=src.grad)
    covered(case, "src", "tgt", "grad_weight", "output", "grad_src")


def check_rvq(case: Case) -> None:
    c, io = case.config, case.io
    quantizer = ResidualVQ(
        c["dim"],
        c["codebook_size"],
        c["num_quantizers"],
        learning="ema",
        metric="cosine" if c.get("use_cosine_sim") else "l2",
        decay=c["decay"],
        commitment=c["commitment_weight"],
        estimator="rotation" if c.get("rotation_trick") else "straight-through",
        shared=c.get("shared_codebook", False),
    )
    load(quantizer, residual.authors_state(case.weights))
    x = leaf(io["x"])
    out = quantizer(x)
    ((out.vectors * io["grad_weight"]).sum() + total(out.losses)).backward()
    check(case, quantized=out.vectors, indices=out.codes, losses=out.stats["commitment"], grad_x=x.grad)
    for level, vectors in enumerate(quantizer.quantizers):
        check(case, **{f"after_embed_{level}": vectors.codebook[None]})
    quantizer.eval()
    out = quantizer(io["eval_x"])
    check(case, eval_quantized=out.vectors, eval_indices=out.codes)
    check(case, eval_codes_per_level=quantizer.decode_levels(io["eval_indices"]))
    check(case, decoded_from_indices=quantizer.decode(io["eval_indices"]), eval_indices=quantizer.encode(io["eval_x"]))
    after = [f"after_embed_{level}" for level in range(c["num_quantizers"])]
    training = ("x", "grad_weight", "quantized", "indices", "losses", "grad_x", *after)
    covered(case, *training, "eval_x", "eval_quantized", "eval_indices", "eval_codes_per_level", "decoded_from_indices")


# --- binary -----------------------------------------------------------------------------------------------------------


def check_lfq_lucidrains(case: Case) -> None:
    c, io = case.config, case.io
    entropy = EntropyTerm(
        weight=c["entropy_loss_weight"],
        temperature=1 / c["inv_temperature"],
        batch=c["diversity_gamma"],
        log="clamp",
    )
    kind = BSQ if c["spherical"] else LFQ
    quantizer = kind(
        (c["bits"],) * c["num_codebooks"],
        c["dim"],
        scale=c["codebook_scale"],
        commitment=c["commitment_loss_weight"],
        entropy=entropy,
    )
    load(quantizer, lfq.authors_state(case.weights))

    x = leaf(io["x"])
    out = quantizer(x)
    aux = total(out.losses)
    ((out.vectors * io["grad_weight"]).sum() + aux).backward()
    check(case, quantized=out.vectors, indices=out.codes, aux_loss=aux, grad_x=x.grad)
    check(case, per_sample_entropy=out.stats["sample_entropy"], codebook_entropy=out.stats["batch_entropy"])
    weight = c["commitment_loss_weight"]
    if weight:
        check(case, commitment=out.losses["commitment"] / weight)
    x = leaf(io["x"])
    total(quantizer(x).losses).backward()
    check(case, grad_aux_only=x.grad)

    quantizer.eval()
    out = quantizer(io["x"])
    check(case, eval_quantized=out.vectors, eval_indices=out.codes)
    check(case, eval_indices=quantizer.encode(io["x"]), decoded_from_indices=quantizer.decode(io["indices"]))
    # the case's table has components of +-scale; on the sphere ours are divided by sqrt(bits)
    check(case, implicit_codebook=quantizer.table() * c["codebook_scale"] / quantizer.component(c["bits"]))
    losses = ("aux_loss", "per_sample_entropy", "codebook_entropy", "commitment", "grad_x", "grad_aux_only")
    outputs = ("quantized", "indices", "eval_quantized", "eval_indices", "decoded_from_indices", "implicit_codebook")
    covered(case, "x", "grad_weight", *losses, *outputs)


def check_lfq_openmagvit2(case: Case) -> None:
    c, io = case.config, case.io
    factors = c["factorized_bits"]
    entropy = EntropyTerm(
        weight=0.1,
        temperature=c["temperature"],
        sample=c["sample_minimization_weight"],
        batch=c["batch_maximization_weight"],
    )
    quantizer = LFQ(factors or c["bits"], bit_order="lsb", commitment=0.25, entropy=entropy, entropy_over="joint")
    z = leaf(io["z"])
    out = quantizer(to_rows(z))
    quantized = like_map(out.vectors, z.shape)
    ((quantized * io["grad_weight"]).sum() + total(out.losses)).backward()
    check(case, quantized=quantized, grad_z=z.grad)
    check(case, per_sample_entropy=out.stats["sample_entropy"], codebook_entropy=out.stats["batch_entropy"])
    check(case, entropy_aux_loss=out.losses["entropy"] / 0.1, commitment=out.losses["commitment"] / 0.25)
    names = ["z", "grad_weight", "quantized", "grad_z", "per_sample_entropy", "codebook_entropy", "entropy_aux_loss"]
    if factors:
        check(case, indices_pre=out.codes[..., 0].flatten(), indices_post=out.codes[..., 1].flatten())
        names += ["indices_pre", "indices_post"]
    else:
        entry = like_map(quantizer.decode(io["indices"].view(out.codes.shape)), z.shape)
        check(case, indices=out.codes.flatten(), codebook_entry=entry)
        names += ["indices", "codebook_entry"]
    covered(case, *names, "commitment")


def check_fsq(case: Case) -> None:
    c, io = case.config, case.io
    quantizer = FSQ(c["levels"], c["dim"], num_codebooks=c["num_codebooks"], symmetric=c["preserve_symmetry"])
    load(quantizer, fsq.authors_state(case.weights))
    x = leaf(io["x"])
    out = quantizer(x)
    (out.vectors * io["grad_weight"]).sum().backward()
    check(case, quantized=out.vectors, indices=out.codes, grad_x=x.grad)
    check(case, indices=quantizer.encode(io["x"]), decoded_from_indices=quantizer.decode(io["indices"]))
    check(case, implicit_codebook=quantizer.table())
    assert not out.losses
    covered(case, "x", "grad_weight", "quantized", "indices", "grad_x", "decoded_from_indices", "implicit_codebook")


# --- codebooks with more than one path for the gradient ---------------------------------------------------------------


def check_simvq(case: Case) -> None:
    c, io = case.config, case.io
    quantizer = SimVQ(
        c["dim"],
        c["codebook_size"],
        codebook_dim=case.weights["frozen_codebook"].shape[1],
        estimator="rotation" if c["rotation_trick"] else "straight-through",
        commitment=c["commitment_weight"] * c["input_to_quantize_commit_loss_weight"],
        codebook_weight=c["commitment_weight"],
    )
    load(quantizer, simvq.authors_state(case.weights))
    x = leaf(io["x"])
    out = quantizer(x)
    loss = total(out.losses)
    ((out.vectors * io["grad_weight"]).sum() + loss).backward()
    check(case, quantized=out.vectors, indices=out.codes, commit_loss=loss, grad_x=x.grad)
    check(case, codebook=quantizer.table(), grad_transform=quantizer.transform.weight.grad)
    names = ("quantized", "indices", "commit_loss", "grad_x", "codebook", "grad_transform")
    covered(case, "x", "grad_weight", *names)


def check_ibq(case: Case) -> None:
    c, io = case.config, case.io
    weight = c["entropy_loss_weight_in_gradient"]
    entropy = EntropyTerm(
        weight=weight,
        temperature=c["entropy_temperature"],
        sample=c["sample_minimization_weight"],
        batch=c["batch_maximization_weight"],
    )
    quantizer = IBQ(c["e_dim"], c["n_e"], commitment=c["beta"], entropy=entropy)
    load(quantizer, ibq.authors_state(case.weights))
    z = leaf(io["z"])
    out = quantizer(to_rows(z))
    quantized = like_map(out.vectors, z.shape)
    ((quantized * io["grad_weight"]).sum() + total(out.losses)).backward()
    entry = like_map(quantizer.decode(out.codes), z.shape)
    check(case, quantized=quantized, grad_z=z.grad, grad_codebook=quantizer.codebook.grad, codebook_entry=entry)
    check(case, quant_loss=out.losses["quantization"])
    check(case, sample_entropy=out.stats["sample_entropy"], avg_entropy=out.stats["batch_entropy"])
    check(case, entropy_loss=replace(entropy, weight=1.0).combine(*out.stats.values()))
    assert_close(out.codes.flatten(), io["indices"].flatten(), name="indices")
    losses = ("quant_loss", "sample_entropy", "avg_entropy", "entropy_loss")
    covered(case, "z", "grad_weight", "quantized", "grad_z", "grad_codebook", "codebook_entry", "indices", *losses)


def check_multiscale(case: Case) -> None:
    c, io = case.config, case.io
    folder = case.kind == "msvq-imagefolder"
    scales = c["v_patch_nums"]
    quantizer = MultiScaleVectorQuantizer(
        c["Cvae"],
        c["vocab_size"],
        scales,
        metric="cosine" if c["using_znorm"] else "l2",
        convs=c["share_quant_resi"],
        ratio=abs(c["quant_resi"]),
        commitment=c["beta"],
        commitment_over="sum" if folder else "mean",
    )
    load(quantizer, multiscale.authors_state(case.weights))
    f = leaf(io["f"])
    out = quantizer(to_rows(f))
    quantized = like_map(out.vectors, f.shape)
    ((quantized * io["grad_weight"]).sum() + total(out.losses)).backward()
    check(case, train_quantized=quantized, grad_f=f.grad, grad_codebook=quantizer.codebook.grad)
    names = ["f", "grad_weight", "train_quantized", "grad_f", "grad_codebook"]
    if folder:
        check(case, train_vq_loss=out.losses["codebook"], train_commit_loss=out.losses["commitment"])
        names += ["train_vq_loss", "train_commit_loss"]
    else:
        check(case, train_loss=total(out.losses))
        names += ["train_loss"]

    quantizer.eval()
    codes = quantizer.encode(to_rows(io["f"]))
    sums = quantizer.cumulative(codes)
    for scale, part in enumerate(quantizer.split(codes)):
        check(case, **{f"codes_scale{scale}": part, f"fhat_scale{scale}": like_map(sums[scale], f.shape)})
        names += [f"codes_scale{scale}", f"fhat_scale{scale}"]
    if not folder:
        given = torch.cat([io[f"codes_scale{scale}"] for scale in range(len(scales))], 1)
        check(case, fhat_from_codes=like_map(quantizer.decode(given), f.shape), var_input=quantizer.next_inputs(given))
        names += ["fhat_from_codes", "var_input", "next_input_after_scale0"]
        if len(scales) > 1:
            _, following = quantizer.advance(0, io["codes_scale0"])
            check(case, next_input_after_scale0=rearrange(following, "b (h w) d -> b d h w", h=scales[1]))
    covered(case, *names)


KINDS = {
    "vq-ema": check_vq_ema,
    "vq-taming": check_vq_taming,
    "vq-l2-entropy": check_vq_l2_entropy,
    "rotation-trick": check_rotation_trick,
    "rvq": check_rvq,
    "lfq-lucidrains": check_lfq_lucidrains,
    "bsq": check_lfq_lucidrains,
    "lfq-openmagvit2": check_lfq_openmagvit2,
    "fsq": check_fsq,
    "simvq": check_simvq,
    "ibq": check_ibq,
    "var-multiscale": check_multiscale,
    "msvq-imagefolder": check_multiscale,
}


@parametrize("quantizers")
def test_authors_numbers(case: Case) -> None:
    if case.kind not in KINDS:
        pytest.fail(f"{case.name}: no quantizer for kind {case.kind!r}")
    torch.manual_seed(0)
    KINDS[case.kind](case)
