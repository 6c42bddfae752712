"""Line charts as SVG text: for reports that open anywhere, without a plotting library.

Colours follow the reader's light or dark mode: in a page of ours by its variables, in a file of its own by the style
that `standalone` puts in front.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import floor, log10

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 58, 96, 16, 48

STYLE = """
.chart { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.chart .grid { stroke: var(--line, #e3e3e0); stroke-width: 1; }
.chart .axis { fill: var(--quiet, #6b6b66); }
.chart .name { font-weight: 600; }
.chart .c0 { --c: var(--c0, #c2410c); } .chart .c1 { --c: var(--c1, #2563a8); }
.chart .c2 { --c: var(--c2, #2f7d4f); } .chart .c3 { --c: var(--c3, #8a5a9e); }
.chart .c4 { --c: var(--c4, #8a7a2f); } .chart .c5 { --c: var(--c5, #4b5563); }
.chart path { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .c0 path { stroke-width: 3; }
.chart .dashed path { stroke-dasharray: 6 5; }
.chart circle, .chart .name { fill: var(--c); }
"""

DARK = (
    "--line: #34332f; --quiet: #a3a29b; --c0: #fb923c; --c1: #7db3f0; --c2: #6fc795; --c3: #c79be0; --c4: #d6c25f; "
    "--c5: #9ca3af"
)


@dataclass(frozen=True)
class Series:
    """One line: its name and its (x, y) points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    colour: int | None = None  # 0 to 5; its place in the list by default
    markers: bool = True


def line_chart(series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False) -> str:
    """An inline SVG of lines with their names at the right end. `log_x`: a logarithmic x axis (all x above 0)."""
    drawn = [line for line in series if line.points]
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    if not xs:
        return '<svg class="chart" viewBox="0 0 640 40"><text class="axis" x="10" y="25">no data</text></svg>'
    x_ticks = log_ticks(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs))
    y_ticks = ticks(min(ys), max(ys))
    x_range = (min(xs), max(xs)) if log_x else (min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1]))
    y_range = (min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1]))

    def place_x(x: float) -> float:
        low, high, value = (log10(x_range[0]), log10(x_range[1]), log10(x)) if log_x else (*x_range, x)
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    floor_y = HEIGHT - BOTTOM
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{floor_y}" y2="{floor_y + 5}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{floor_y + 20}" text-anchor="middle">{short(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="axis" transform="translate(15 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    heights = _apart([place_y(line.points[-1][1]) for line in drawn])
    for place, (line, height) in enumerate(zip(drawn, heights, strict=True)):
        dots = [(place_x(x), place_y(y)) for x, y in line.points]
        colour = place if line.colour is None else line.colour
        parts.append(f'<g class="c{colour % 6}{" dashed" if line.dashed else ""}">')
        parts.append('<path d="M' + " L".join(f"{x:.1f} {y:.1f}" for x, y in dots) + '"/>')
        if line.markers:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in dots]
        x = dots[-1][0] + 9
        parts.append(f'<text class="name" x="{x:.1f}" y="{height + 4:.1f}">{escape(line.name)}</text></g>')
    return "\n".join([*parts, "</svg>"])


def standalone(svg: str) -> str:
    """The same chart as a file of its own, with its colours for light and dark."""
    style = f"<style>{STYLE}@media (prefers-color-scheme: dark) {{ .chart {{ {DARK} }} }}</style>"
    head, _, rest = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">{style}{rest}\n'


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`, a step of 1, 2 or 5 times a power of ten apart."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = floor(low / step + 1e-9)
    found = [first * step]
    while found[-1] < high - 1e-9 * span:
        found.append((first + len(found)) * step)
    return [float(f"{tick:.10g}") for tick in found]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between `low` and `high`."""
    powers = range(floor(log10(low)), floor(log10(high)) + 1)
    return [
        float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high
    ]


def short(value: float) -> str:
    """A tick's number in few letters: 20000 is 20k."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _apart(heights: list[float], gap: float = 16.0) -> list[float]:
    """The same heights, moved so that names do not overlap and stay on the chart."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    over = max([0.0, *(height - (HEIGHT - BOTTOM) for height in moved)])
    return [height - over for height in moved]
