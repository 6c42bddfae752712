"""Two processes that each see half of a batch hold the same statistics, bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vistok.quantize import BSQ, IBQ, LFQ, EntropyTerm, Quantizer, ResidualVQ, VectorQuantizer

STEPS = 4
TERM = EntropyTerm(weight=1.0, temperature=0.5)


def build() -> dict[str, Quantizer]:
    torch.manual_seed(0)
    return {
        "ema": VectorQuantizer(4, 16, learning="ema", decay=0.8),
        "ema-cosine-restart": VectorQuantizer(4, 16, learning="ema", metric="cosine", decay=0.8, restart_below=1.0),
        "gradient-restart": VectorQuantizer(4, 16, decay=0.5, restart_below=1.0),
        "cvq": VectorQuantizer(4, 16, learning="cvq"),
        "rvq-dropout": ResidualVQ(4, 16, 3, learning="ema", restart_below=0.5, dropout=1.0),
        "rvq-shared": ResidualVQ(4, 16, 2, learning="ema", shared=True),
        "vq-entropy": VectorQuantizer(4, 16, entropy=TERM),
        "lfq": LFQ(4, entropy=TERM),
        "bsq": BSQ((2, 2), entropy=TERM, entropy_over="bit"),
        "ibq": IBQ(4, 16, entropy=TERM),
    }


def batches(share: slice) -> torch.Tensor:
    return torch.randn(STEPS, 6, 5, 4, generator=torch.Generator().manual_seed(1))[:, share]


def train(quantizer: Quantizer, data: torch.Tensor) -> dict[str, torch.Tensor]:
    for step, z in enumerate(data):
        rows = z.clone().requires_grad_()
        if isinstance(quantizer, ResidualVQ) and quantizer.dropout:
            out = quantizer(rows, generator=torch.Generator().manual_seed(step))
        else:
            out = quantizer(rows)
    state = {key: value.detach().clone() for key, value in quantizer.state_dict().items()}
    if "entropy" in out.losses:
        out.losses["entropy"].backward()
        state["batch_entropy"], state["sample_entropy"] = out.stats["batch_entropy"], out.stats["sample_entropy"]
        state["gradient"] = rows.grad
    state["frequencies"] = torch.cat(quantizer.usage.frequencies())
    return state


def worker(rank: int, folder: str, uneven: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    split = 4 if uneven else 3
    share = slice(0, split) if rank == 0 else slice(split, 6)
    torch.manual_seed(100 + rank)  # processes' own generators differ
    states = {name: train(quantizer, batches(share)) for name, quantizer in build_once().items()}
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def build_once() -> dict[str, Quantizer]:
    state = torch.get_rng_state()
    built = build()
    torch.set_rng_state(state)
    return built


@pytest.fixture(scope="module", params=[False, True], ids=["even", "uneven"])
def states(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder), request.param), nprocs=2)
    both = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    both[0]["split"] = torch.tensor(4 if request.param else 3)
    return both


@pytest.mark.parametrize("name", list(build()))
def test_statistics_agree_bit_for_bit(states: list[dict], name: str) -> None:
    own = {"gradient", "sample_entropy"}  # of a process's own items
    for key, value in states[0][name].items():
        if key not in own:
            assert torch.equal(value, states[1][name][key]), f"{name}: {key} differs between processes"


@pytest.mark.parametrize("name", ["ema", "rvq-shared", "cvq", "vq-entropy", "lfq", "bsq", "ibq"])
def test_two_processes_equal_one_with_the_whole_batch(states: list[dict], name: str) -> None:
    """Where nothing is drawn at random."""
    whole = train(copy.deepcopy(build()[name]), batches(slice(0, 6)))
    for key, value in states[0][name].items():
        if key in ("gradient", "sample_entropy"):
            continue
        torch.testing.assert_close(value, whole[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("states", [False], ids=["even"], indirect=True)
@pytest.mark.parametrize("name", ["vq-entropy", "lfq", "bsq", "ibq"])
def test_averaged_gradients_are_those_of_the_whole_batch(states: list[dict], name: str) -> None:
    """DistributedDataParallel halves every process's gradient; the batch entropy then has its global gradient."""
    whole = train(copy.deepcopy(build()[name]), batches(slice(0, 6)))["gradient"]
    halves = torch.cat([state[name]["gradient"] for state in states]) / 2
    torch.testing.assert_close(halves, whole, atol=1e-6, rtol=1e-4)


def test_restarted_rows_come_from_the_latents_of_both(states: list[dict]) -> None:
    rows = states[0]["gradient-restart"]["codebook"]
    split = int(states[0]["split"])
    shares = [batches(share).reshape(-1, 4) for share in (slice(0, split), slice(split, 6))]
    found = [int((rows[:, None] == share[None]).all(2).any(1).sum()) for share in shares]
    assert found[0] > 0
    assert found[1] > 0
