"""What a run measures of itself at every logged step, from tensors that the step has anyway: no second forward pass.

    batch, decoder's output ─┐
    gradients per part ──────┼─> Vitals.observe (on steps that are logged) ─> Vitals.row ─> RUN/vitals.csv ─> doctor
    counts of the quantizers ┘

Columns of a row, each present where the model has what it measures:

    pixel_low, pixel_high                        range of the batch, meant to be [0, 1]
    output_low, output_high, output_outside      range of what the decoder gave, and the share of it outside [0, 1]
    output_slope, output_offset, output_fit      output = slope * pixels + offset, and the correlation: 2 and -1 betray
                                                 a model that rebuilds the picture in [-1, 1]
    detached/TERM                                1 where no gradient flows from a term of the loss
    grad/PART                                    norm of the gradient over a part (encoder, quantizer, decoder, ...),
                                                 before clipping; 0 where a part that trains got none
    size/Q, seen/Q, used/Q, perplexity/Q         of quantizer Q over its latest survey: codes, codes counted, share of
                                                 the codes that occurred, exp(entropy); geometric means over several
                                                 codebooks. A survey goes on until each code could occur 16 times
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from vistok.processes import sum_over_processes
from vistok.quantize.base import Quantizer
from vistok.training.sharding import together

SAMPLED = 1 << 16  # values of a batch that are compared with the pixels: a correlation to within 1 %
SURVEY = 16  # codes counted per code of the codebook before a survey ends: at equal use all but 1e-7 have occurred


class Vitals:
    """Watches `model`, and further modules by name (discriminators), until `close`.

    Set `due` before a step whose row will be written; then call `observe` after its backward pass, before gradients are
    clipped. `row` is for all processes alike: it adds up their counts.
    """

    def __init__(self, model: nn.Module, others: Mapping[str, nn.Module] | None = None) -> None:
        self.due = False
        self._parts = dict(model.named_children()) | dict(others or {})
        self._surveys = {
            name: _Survey(module)
            for name, module in model.named_modules()
            if isinstance(module, Quantizer) and module.usage.tracked
        }
        self._found: dict[str, Tensor] = {}
        self._output: Tensor | None = None
        decoder = getattr(model, "decoder", None)
        plain = isinstance(decoder, nn.Module) and decoder._compiled_call_impl is None  # a hook would break its graph
        self._hook = decoder.register_forward_hook(self._keep) if plain else None  # type: ignore[union-attr]

    def observe(self, batch: Mapping[str, Any], terms: Mapping[str, Tensor]) -> None:
        """Measure the step that has just been computed, if it is due; its numbers stay on the device until `row`."""
        if not self.due:
            return
        found: dict[str, Tensor] = {}
        pixels, output = batch.get("pixels"), self._output
        self._output = None
        with torch.no_grad():
            if isinstance(pixels, Tensor) and pixels.numel():
                found["pixel_low"], found["pixel_high"] = torch.aminmax(pixels.float())
                if output is not None and output.shape[1:] == pixels.shape[1:]:
                    found |= _compare(output, pixels[-len(output) :])  # of an accumulated batch, its last part
            for name, term in terms.items():
                found[f"detached/{name}"] = torch.tensor(float(not term.requires_grad))
            for name, part in self._parts.items():
                trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
                if trained:
                    grads = [parameter.grad for parameter in trained if parameter.grad is not None]
                    found[f"grad/{name}"] = together(get_total_norm(grads)) if grads else torch.zeros(())
        self._found = found

    def row(self) -> dict[str, float]:
        """The numbers of the step observed last, and of the codes since the survey began. Waits for the device."""
        found, self._found = self._found, {}
        values = torch.stack([value.double().cpu() for value in found.values()]).tolist() if found else []
        row = dict(zip(found, values, strict=True))
        for name, survey in self._surveys.items():
            row |= {f"{key}/{name}": value for key, value in survey.take().items()}
        return row

    def close(self) -> None:
        """Let go of the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.due and isinstance(output, Tensor) and output.is_floating_point():
            self._output = output.detach()


class _Survey:
    """How often each code of a quantizer occurred since the survey began, from counters that others may reset."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.before = quantizer.usage.counts.clone()
        self.counts = torch.zeros_like(self.before)

    def take(self) -> dict[str, float]:
        """size, seen, used and perplexity so far; nothing where no code was counted."""
        now = self.quantizer.usage.counts
        fresh = now - self.before
        fresh = torch.where((fresh < 0).any(), now, fresh)  # a reset lies between
        self.before = now.clone()
        self.counts += sum_over_processes(fresh)
        sizes = list(self.quantizer.codebooks)
        parts = self.counts[:-1].double().split(sizes)
        seen = torch.stack([part.sum() for part in parts]).mean()
        shares = [part / part.sum().clamp(min=1) for part in parts]
        used = torch.stack([(part > 0).double().mean() for part in parts]).mean()
        entropy = torch.stack([torch.special.entr(share).sum() for share in shares]).mean()
        count, share, perplexity = torch.stack([seen, used, entropy.exp()]).tolist()
        if count == 0:
            return {}
        if count >= SURVEY * max(sizes):
            self.counts.zero_()
        size = float(torch.tensor(sizes, dtype=torch.float64).log().mean().exp())
        return {"size": size, "seen": count, "used": share, "perplexity": perplexity}


def _compare(output: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """Range of the output, and the straight line that explains it best by the pixels."""
    low, high = torch.aminmax(output.float())
    outside = ((output < -0.05) | (output > 1.05)).float().mean()  # beyond what ringing at an edge may overshoot
    stride = max(1, output.numel() // SAMPLED)
    y, x = output.reshape(-1)[::stride].float(), pixels.reshape(-1)[::stride].float()
    dx, dy = x - x.mean(), y - y.mean()
    spread, covariance = dx.square().mean().clamp(min=1e-12), (dx * dy).mean()
    slope = covariance / spread
    fit = covariance / (spread * dy.square().mean()).sqrt().clamp(min=1e-12)
    return {
        "output_low": low,
        "output_high": high,
        "output_outside": outside,
        "output_slope": slope,
        "output_offset": y.mean() - slope * x.mean(),
        "output_fit": fit,
    }
