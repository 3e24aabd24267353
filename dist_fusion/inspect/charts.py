"""Histograms and bars, drawn by a few lines of SVG and HTML."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dist_fusion.inspect.markup import Cell, Markup, joined, table, tag

WIDE, HIGH, FOOT = 370, 90, 32  # of a histogram: its bars, and what stands below them
MOST_BARS = 48
WIDEST = 20  # of a bar
SHOWN = 0.99  # share of the values that have bars of their own; the rest is one bar, where it is a long way off
WIDTHS = (1, 2, 4, 5, 8, 10, 20, 40, 50, 80)


class Mark(NamedTuple):
    """A value worth a line: it stands before that value."""

    value: int
    told: str


def histogram(counts: Mapping[int, int], mark: Mark | None = None, scale: float = 1) -> Markup:
    """How often each value was there, as an SVG of up to MOST_BARS bars; `scale` is what a value of 1 is told as."""
    if not counts:
        return tag("p.quiet", "none")
    marked = [mark.value] if mark else []
    low, highest = min([*counts, *marked]), max([*counts, *marked])
    high = max([_quantile(counts, SHOWN), *marked])
    width = _width(high - low + 1)
    if _width(highest - low + 1) == width:
        high = highest
    first, last = low // width, high // width
    bars: Counter[int] = Counter()
    for value, count in counts.items():
        bars[min(value // width, last + 1)] += count
    most, beyond = max(bars.values()), last + 1 in bars
    step = min(WIDEST, WIDE / (last + 1 - first + beyond))
    drawn = []
    for bar, count in sorted(bars.items()):
        tall = max(1.0, HIGH * count / most)
        place = {"x": f"{(bar - first) * step:.1f}", "y": f"{14 + HIGH - tall:.1f}"}
        drawn.append(
            tag(
                "rect.bar",
                tag("title", f"{_range(bar * width, width, scale, bar > last)}: {count:,}"),
                attributes={**place, "width": f"{max(step - 1, 0.5):.1f}", "height": f"{tall:.1f}"},
            )
        )
    ground = 14 + HIGH
    drawn.append(tag("line.axis", attributes={"x1": 0, "x2": WIDE, "y1": ground, "y2": ground}))
    drawn.append(_text(0, 10, f"up to {most:,}"))
    ends = [(first, 0.0, "start")]
    if last > first and not (mark and mark.value // width == last):  # the mark tells its own
        ends.append((last, (last + 1 - first) * step, "end"))
    drawn += [_text(x, ground + 14, f"{bar * width * scale:g}", anchor) for bar, x, anchor in ends]
    if beyond:
        drawn.append(_text((last + 1.5 - first) * step, ground + 28, "more", "end"))
    if mark:
        x = (mark.value / width - first) * step
        drawn.append(tag("line.mark", attributes={"x1": x, "x2": x, "y1": 0, "y2": ground + 4}))
        drawn.append(_text(x, ground + 28, mark.told, "end" if x > WIDE / 2 else "start", "told"))
    return tag("svg", *drawn, attributes={"viewBox": f"0 0 {WIDE} {ground + FOOT}", "role": "img"})


def ranked(counts: Mapping[str, int], most: int) -> Markup:
    """The most frequent names, each with a bar and its share of all."""
    total, ordered = sum(counts.values()), Counter(counts).most_common(most)
    rows: list[list[Cell]] = [
        [tag("span.untrusted", name), count, f"{count / total:.1%}", _bar(count / ordered[0][1])]
        for name, count in ordered
    ]
    left = len(counts) - len(ordered)
    more = tag("p.quiet", f"and {left:,} more") if left else Markup("")
    return joined([table(("", "", "", ""), rows), more])


def _bar(share: float) -> Markup:
    return tag("div.length", attributes={"style": f"width: {max(1, round(110 * share))}px"})


def _text(x: float, y: float, said: str, anchor: str = "start", kind: str = "") -> Markup:
    name = f"text.{kind}" if kind else "text"
    return tag(name, said, attributes={"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor})


def _quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest value that so much of all is not above."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)


def _width(extent: int) -> int:
    """How many values a bar stands for: of WIDTHS, so that 40 tokens end where a bar does."""
    widths = (factor * 10**power for power in range(0, 30, 2) for factor in WIDTHS)
    return next(width for width in widths if width * MOST_BARS >= extent)


def _range(value: int, width: int, scale: float, beyond: bool) -> str:
    if beyond:
        return f"{value * scale:g} and more"
    return f"{value * scale:g}" if width == 1 else f"{value * scale:g} to {(value + width - 1) * scale:g}"
