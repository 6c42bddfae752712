"""`vistok app`: a page on this machine: drop a photograph in, and see what its tokens carry.

    photograph -> tokenizer, number of tokens -> reconstruction, difference, token map, bits
               -> tokens shuffled, repeated, painted over or moved -> what the picture becomes
               -> one token set, drawn anew or a bit of it flipped -> which pixels change
    class -> generator -> pictures

Everything that a button does is a plain function here, `rebuild`, `edited`, `change_token`, `generated`; `build` puts
Gradio in front of them. The page answers on the loopback address alone unless told otherwise, takes pictures up to a
limit, and works on one request at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import vistok
from vistok.edits import ACTIONS, EDITS, edited, grid_of, position_at, segment_at, with_token
from vistok.errors import InputError, VistokError
from vistok.evaluation.reconstruction import fitting
from vistok.extras import import_extra
from vistok.metrics.psnr import psnr
from vistok.pixels import from_pil
from vistok.tokenizer import Tokenizer
from vistok.tokens import Tokens

if TYPE_CHECKING:
    from vistok.generator import Generator

MOST_PIXELS, MOST_BYTES = 1 << 21, "12mb"
SHOWN = 768  # the longer side of a picture that is scaled down to be worked on


@dataclass(frozen=True)
class Rebuilt:
    """Pictures uint8 (H, W, 3) and what is said of them. `map` is None where tokens have no place."""

    picture: np.ndarray
    difference: np.ndarray
    map: np.ndarray | None
    told: str


@dataclass(frozen=True)
class Changed:
    """What one token does: the picture after it was changed and where it differs, uint8 (H, W, 3), and words on it.

    `where` is the largest difference of the three colours, scaled so that the largest of all is white.
    """

    picture: np.ndarray
    where: np.ndarray
    told: str


@cache
def tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name or folder, loaded once."""
    model = vistok.load(name)
    if not isinstance(model, Tokenizer):
        raise InputError(f"{name} is a {model.role}; this page takes tokenizers")
    return model


@cache
def generator(name: str | None) -> "Generator":
    """A generator by name or folder (the one that ships if None), loaded once."""
    from vistok.pairing import load_generator

    return load_generator(name)


def prepared(image: Image.Image) -> Image.Image:
    """A picture as it is worked on: RGB, its longer side at most `SHOWN` pixels. Raises InputError for a huge one."""
    if image.width * image.height > MOST_PIXELS * 32:
        raise InputError(f"a picture of {image.width} x {image.height} pixels is too large for this page")
    image = image.convert("RGB")
    scale = SHOWN / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def rebuild(name: str, image: Image.Image, share: float = 1.0, edit: str = EDITS[0], seed: int = 0) -> Rebuilt:
    """Encode, keep a share of the prefixes, edit, decode, and say how well. Raises InputError for an unknown edit."""
    model, pixels, tokens, kept = _kept(name, image, share)
    length = kept.length
    changed = edited(kept, edit, seed)
    decoded = model.decode(changed, dtype=torch.uint8).cpu()
    difference = (decoded.int() - pixels.int()).abs().mul(4).clamp(max=255).to(torch.uint8)
    bits = int(kept.bits()[0])
    told = (
        f"**{length} of {tokens.length} tokens**, {bits:,} bits ({bits / 8:,.0f} bytes), "
        f"{bits / prod(_size(pixels)):.4f} bits per pixel, PSNR {float(psnr(decoded, pixels)[0]):.2f} dB"
    )
    return Rebuilt(_array(decoded), _array(difference), token_map(changed, _size(pixels)), told)


def _kept(name: str, image: Image.Image, share: float) -> tuple[Tokenizer, torch.Tensor, Tokens, Tokens]:
    """The tokenizer, the picture's pixels, its tokens, and the share of them that is looked at."""
    model, pixels = tokenizer(name), from_pil(prepared(image))
    tokens = model.encode(pixels, on_size=fitting(model.spec, _size(pixels)))
    lengths = model.spec.of(tokens.canvas[0]).prefixes
    length = lengths[min(len(lengths) - 1, max(0, round(share * len(lengths)) - 1))]
    return model, pixels, tokens, tokens if length == tokens.length else tokens.prefix(length)


def change_token(
    name: str,
    image: Image.Image,
    position: int,
    action: str = ACTIONS[1],
    *,
    value: float = 0,
    column: int = 0,
    share: float = 1.0,
    edit: str = EDITS[0],
    seed: int = 0,
) -> Changed:
    """Change one token of what `rebuild` shows (the same share and edit of the picture), and see which pixels follow.

    position, action, value, column: as of `with_token`, which says what is raised.
    """
    model, _, _, kept = _kept(name, image, share)
    before = edited(kept, edit, seed)
    after = with_token(before, position, action, value=value, column=column, seed=seed)
    pictures = [model.decode(tokens, dtype=torch.uint8).cpu() for tokens in (before, after)]
    gap = (pictures[1].int() - pictures[0].int()).abs().amax(1)[0]
    largest = int(gap.max())
    where = (gap * 255 / max(largest, 1)).to(torch.uint8)[None, None].expand(1, 3, -1, -1)
    return Changed(
        _array(pictures[1]), _array(where), f"{_token_told(before, after, position, column)}: {_gap_told(gap)}"
    )


def picked(name: str, image: Image.Image, share: float, x: float, y: float) -> int:
    """`position_at` of what `rebuild` shows of a picture."""
    _, pixels, _, kept = _kept(name, image, share)
    return position_at(kept, _size(pixels), x, y)


def token_map(tokens: Tokens, size: tuple[int, int]) -> np.ndarray | None:
    """The finest grid of codes as colours, uint8 (H, W, 3), equal codes alike. None where there is no grid."""
    grid = grid_of(tokens)
    if tokens.codes is None or grid is None:
        return None
    segment, start = grid
    codes = tokens.codes[0, start : start + segment.count]
    best = (codes if codes.ndim == 1 else codes[:, 0]).view(segment.shape)
    hue = (best.double() * 0.381966) % 1  # the golden ratio spreads neighbouring numbers over the circle
    wheel = (torch.tensor([0.0, 1 / 3, 2 / 3])[:, None, None] + hue).mul(2 * torch.pi).cos().mul(0.4).add(0.5)
    image = Image.fromarray(wheel.mul(255).byte().permute(1, 2, 0).numpy())
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.NEAREST))


def _token_told(before: Tokens, after: Tokens, position: int, column: int) -> str:
    segment, start = segment_at(before, position)
    at = ", ".join(map(str, np.unravel_index(position - start, segment.shape)))
    place = f"**token {position}**, {segment.name} ({at})"
    if before.codes is None:
        return f"{place}, a vector of {segment.dim}"
    old, new = (
        int(part[0, position] if part.ndim == 2 else part[0, position, column]) for part in (before.data, after.data)
    )
    several = f", column {column}" if len(segment.codebooks) > 1 else ""
    return f"{place}{several}, code {old} to {new} of {segment.codebooks[column]:,}"


def _gap_told(gap: torch.Tensor) -> str:
    """What is said of differences (H, W) in levels of 255."""
    changed = gap > 0
    if not bool(changed.any()):
        return "no pixel changes"
    rows, columns = (changed.any(axis).nonzero().flatten() for axis in (1, 0))
    share, mean = float(changed.double().mean()), float(gap[changed].double().mean())
    return (
        f"{share:.1%} of the pixels change, by {mean:.1f} levels on average and {int(gap.max())} at most, within rows "
        f"{int(rows[0])} to {int(rows[-1])} and columns {int(columns[0])} to {int(columns[-1])}"
    )


def generated(name: str | None, condition: str, count: int, guidance: float | None, seed: int) -> list[np.ndarray]:
    """Pictures uint8 (H, W, 3) of a class. Raises InputError for a class that the generator does not know."""
    model = generator(name)
    tokens = model.generate(condition, count=count, guidance=guidance, seed=seed)
    assert model.tokenizer is not None
    pixels = model.tokenizer.decode(tokens, dtype=torch.uint8).cpu()
    return [_array(one[None]) for one in pixels]


# -- the page ----------------------------------------------------------------------------------------------------------


def build(models: Sequence[str] = ("strata",), generator_name: str | None = None) -> Any:
    """The page, as Gradio's Blocks. Raises MissingExtraError without Gradio."""
    gr = import_extra("gradio", "app")

    def look(name: str, image: Any, share: float, edit: str, seed: float) -> tuple[Any, Any, Any, str]:
        if image is None:
            return None, None, None, "Drop a photograph into the box on the left."
        try:
            found = rebuild(name, image, share / 100, edit, int(seed))
        except VistokError as error:
            raise gr.Error(str(error)) from error
        return found.picture, found.difference, found.map, found.told

    def change(
        name: str,
        image: Any,
        share: float,
        edit: str,
        seed: float,
        position: float,
        column: float,
        action: str,
        value: float,
    ) -> tuple[Any, Any, str]:
        if image is None:
            return None, None, "Drop a photograph into the box above."
        told: dict[str, Any] = {"value": value or 0, "column": int(column or 0), "share": share / 100, "edit": edit}
        try:
            found = change_token(name, image, int(position or 0), action, seed=int(seed or 0), **told)
        except VistokError as error:
            raise gr.Error(str(error)) from error
        return found.picture, found.where, found.told

    def pick(name: str, image: Any, share: float, event: Any) -> int:
        try:
            return picked(name, image, share / 100, *event.index)
        except VistokError as error:
            raise gr.Error(str(error)) from error

    pick.__annotations__["event"] = gr.SelectData  # by which Gradio knows what to hand over

    def make(condition: str, count: float, guidance: float, seed: float) -> list[np.ndarray]:
        try:
            return generated(generator_name, condition, int(count), guidance or None, int(seed))
        except VistokError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="vistok", analytics_enabled=False) as page:
        gr.Markdown("# vistok\nWhat a tokenizer keeps of a picture, and what its tokens carry.")
        with gr.Tab("Tokens"):
            with gr.Row():
                with gr.Column():
                    image = gr.Image(
                        type="pil", label="photograph", sources=["upload", "clipboard"], elem_id="photograph"
                    )
                    name = gr.Dropdown(list(models), value=models[0], label="tokenizer", elem_id="tokenizer")
                    share = gr.Slider(1, 100, value=100, step=1, label="share of the tokens, %", elem_id="share")
                    edit = gr.Radio(list(EDITS), value=EDITS[0], label="tokens", elem_id="edit")
                    seed = gr.Number(0, label="seed of the shuffle", precision=0)
                with gr.Column():
                    rebuilt = gr.Image(label="rebuilt", interactive=False, elem_id="rebuilt")
                    told = gr.Markdown(elem_id="told")
                    with gr.Row():
                        difference = gr.Image(label="difference x 4", interactive=False, elem_id="difference")
                        grid = gr.Image(label="codes of the finest grid", interactive=False, elem_id="map")
            gr.Markdown("### One token\nClick on the map of codes, or name a position, and see which pixels follow it.")
            with gr.Row():
                with gr.Column():
                    position = gr.Number(0, label="position in the sequence", precision=0, elem_id="position")
                    action = gr.Radio(list(ACTIONS), value=ACTIONS[1], label="what is done to it", elem_id="action")
                    value = gr.Number(0, label="the code to set, or the bit to flip", elem_id="value")
                    column = gr.Number(0, label="column, where a token has several codes", precision=0)
                    once = gr.Button("change this token", elem_id="change")
                with gr.Column():
                    touched = gr.Markdown(elem_id="touched")
                    with gr.Row():
                        changed = gr.Image(label="after the change", interactive=False, elem_id="changed")
                        where = gr.Image(label="pixels that change", interactive=False, elem_id="where")
            inputs, outputs = [name, image, share, edit, seed], [rebuilt, difference, grid, told]
            single, shown = [*inputs, position, column, action, value], [changed, where, touched]
            once.click(change, single, shown, show_progress="minimal")
            grid.select(pick, [name, image, share], position).then(change, single, shown, show_progress="minimal")
            for part in (image, name, edit, seed):
                part.change(look, inputs, outputs, show_progress="minimal")
            share.release(look, inputs, outputs, show_progress="minimal")
        with gr.Tab("Generate"):
            with gr.Row():
                condition = gr.Textbox("dog", label="class", elem_id="class")
                count = gr.Slider(1, 16, value=8, step=1, label="pictures")
                guidance = gr.Slider(0, 8, value=0, step=0.25, label="guidance, 0 for the published one")
                number = gr.Number(0, label="seed", precision=0)
            button = gr.Button("generate", elem_id="generate")
            gallery = gr.Gallery(label="pictures", columns=8, elem_id="pictures")
            button.click(make, [condition, count, guidance, number], gallery)
    return page.queue(default_concurrency_limit=1, max_size=16)


def serve(
    models: Sequence[str] = ("strata",),
    *,
    port: int = 7860,
    host: str = "127.0.0.1",
    generator_name: str | None = None,
    block: bool = True,
) -> Any:
    """Open the page at http://127.0.0.1:PORT. `block`: until it is interrupted. Raises InputError for a port in use."""
    for name in models:
        tokenizer(name)
    page = build(models, generator_name)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=not block,
            max_file_size=MOST_BYTES,
            enable_monitoring=False,
        )
    except OSError as error:
        raise InputError(f"cannot answer on port {port}: {error}; choose another with --port") from error
    return page


def _size(pixels: torch.Tensor) -> tuple[int, int]:
    return pixels.shape[-2], pixels.shape[-1]


def _array(pixels: torch.Tensor) -> np.ndarray:
    picture = pixels[0].permute(1, 2, 0).numpy()
    return picture if picture.shape[2] == 3 else picture.repeat(3, axis=2)
