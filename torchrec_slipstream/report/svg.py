"""Charts as SVG text, drawn by hand: they need no library, no script and no network, and print as they look.

Every text that comes from outside is escaped here. Charts are ``WIDTH`` wide in units of their own, and scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor, log10

# Okabe and Ito's, which colour-blind readers tell apart, dark enough on white; lines also differ by their dashes.
COLOURS = ("#0072b2", "#d55e00", "#00795a", "#a8477f", "#8f6400", "#3b8fc2")
GREY, LIGHT = "#6b6b6b", "#d9dde1"
WIDTH, HEIGHT = 540, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 12, 38
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 3", "4 4")
_MOST_DOTS = 60
Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """``points`` are ``(x, y)``, ascending by x. A ``reference`` is thin and dashed, without dots."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    reference: bool = False


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of ``parts`` one after the other, each ``(value, colour, what it is)``; ``mark`` is a tick."""

    label: str
    parts: Sequence[tuple[float, str, str]]
    value: str
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Column:
    """Columns at ``x`` above 0 (``up``) and below it (``down``), with what the tooltip says."""

    x: float
    up: float
    down: float
    said: str


def share(value: float) -> str:
    """A share for people: 7.9%."""
    return f"{value:.1%}" if 0.0 < abs(value) < 0.9995 else f"{value:.0%}"


def percent(value: float) -> str:
    """A share for an axis: 2.5%, 40%."""
    return f"{100 * value:.4g}%"


def number(value: float) -> str:
    """A number for an axis: 0.25, 1,500, 12k, 3.4M."""
    for least, one, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / one:,.0f}{unit}" if abs(value) >= 100 * one else f"{value / one:.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about so many: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / wanted
    if raw < 1e-300:  # no power of ten is as small
        return [low]
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * raw)
    return [round(i * step, 12) for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def lines(
    title: str,
    drawn: Sequence[Line],
    *,
    show: Format = number,
    hover: Format | None = None,
    bounds: tuple[float | None, float | None] = (0.0, None),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over steps; ``bounds`` of the y axis, None where the data decide. ``marks`` are ticks at the bottom.
    ``show`` words the axis, ``hover`` (default: the same) the tooltips."""
    values = [y for line in drawn for _, y in line.points]
    steps = [x for line in drawn for x, _ in line.points] + [x for x, _ in marks]
    low, high = _bounds(values, bounds)
    frame = _Frame(min(steps, default=0.0), max(steps, default=1.0), low, high)
    out = [frame.grid(show)]
    for x, said in marks:
        at = frame.x(x)
        out.append(
            f'<path d="M{at:.1f} {frame.y(low):.1f}v-9" stroke="{GREY}" stroke-width="1.4">{_title(said)}</path>'
        )
    for line in drawn:
        colour = GREY if line.reference else COLOURS[line.colour % len(COLOURS)]
        dashes = "5 4" if line.reference else _DASHES[line.colour % len(_DASHES)]
        path = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line.points)
        out.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{1.3 if line.reference else 2}" '
            f'stroke-linejoin="round" stroke-dasharray="{dashes}">{_title(line.name)}</path>'
        )
        if not line.reference:
            radius = 2.6 if len(line.points) <= _MOST_DOTS else 0.0
            out += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius or 4}" '
                f'fill="{colour}" fill-opacity="{1 if radius else 0}">'
                f"{_title(f'{line.name}, step {x:,.0f}: {(hover or show)(y)}')}</circle>"
                for x, y in line.points
            ]
    return _svg(title, HEIGHT, out)


def columns(title: str, drawn: Sequence[Column], *, show: Format = number, names: Sequence[str] = ()) -> str:
    """Columns over steps, or over ``names``, of which column ``i`` has the one at ``x == i``."""
    xs = sorted(column.x for column in drawn)
    gap = min((b - a for a, b in pairwise(xs) if b > a), default=max(xs, default=1.0) or 1.0)
    least, most = min(xs, default=0.0) - gap / 2, max(xs, default=1.0) + gap / 2
    up, down = (max((getattr(column, side) for column in drawn), default=0.0) for side in ("up", "down"))
    frame = _Frame(least, most, -1.08 * down, 1.08 * up or float(down == 0))
    width = max(1.0, min(28.0, 0.8 * (frame.x(least + gap) - frame.x(least))))
    out = [frame.grid(lambda value: show(abs(value)), over_steps=not names)]
    longest = max(map(len, names), default=0)
    every = ceil(len(names) * (7.0 * longest + 6) / (WIDTH - _LEFT - _RIGHT)) if names else 1
    for i, name in enumerate(names):
        if i % every == 0:
            out.append(_text(frame.x(i), HEIGHT - _BOTTOM + 15, name, "middle"))
    for column in drawn:
        for value, colour in ((column.up, COLOURS[0]), (-column.down, COLOURS[1])):
            if value:
                top, bottom = sorted((frame.y(value), frame.y(0.0)))
                out.append(
                    f'<rect x="{frame.x(column.x) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
                    f'height="{max(bottom - top, 0.7):.1f}" fill="{colour}">{_title(column.said)}</rect>'
                )
    base = frame.y(0.0)
    out.append(f'<path d="M{_LEFT} {base:.1f}H{WIDTH - _RIGHT}" stroke="{GREY}"/>')
    return _svg(title, HEIGHT, out)


def bars(title: str, drawn: Sequence[Bar], *, show: Format = percent, most: float | None = None) -> str:
    """Horizontal bars, one a line, their value at the right; the axis ends at ``most`` (default: the longest)."""
    labels = max((len(bar.label) for bar in drawn), default=0)
    left = min(24 + 6.3 * min(labels, 26), 190)
    right, line = 66.0, 19.0
    longest = max((sum(value for value, *_ in bar.parts) for bar in drawn), default=0.0)
    marked = max((bar.mark[0] for bar in drawn if bar.mark), default=0.0)
    most = most or max(longest, marked) or 1.0
    height = 8 + line * len(drawn) + 24
    scale = (WIDTH - left - right) / most
    out = []
    for tick in ticks(0.0, most, 4):
        at = left + scale * tick
        out.append(f'<path d="M{at:.1f} 4V{height - 22:.0f}" stroke="{LIGHT}"/>')
        out.append(_text(at, height - 8, show(tick), "middle"))
    for i, bar in enumerate(drawn):
        y = 8 + line * i
        # The end of a qualified name is what tells tables apart.
        short = bar.label if len(bar.label) <= 26 else "…" + bar.label[-25:]
        out.append(f"<g>{_title(bar.label)}{_text(left - 7, y + 11, short, 'end')}</g>")
        begin = left
        for value, colour, said in bar.parts:
            width = scale * value
            out.append(
                f'<rect x="{begin:.1f}" y="{y:.1f}" width="{width:.1f}" height="13" fill="{colour}">'
                f"{_title(f'{bar.label}: {said}')}</rect>"
            )
            begin += width
        if bar.mark is not None:
            at = left + scale * bar.mark[0]
            out.append(
                f'<path d="M{at:.1f} {y - 2:.1f}v17" stroke="#1a1a1a" stroke-width="2.4">'
                f"{_title(f'{bar.label}: {bar.mark[1]}')}</path>"
            )
        out.append(_text(WIDTH - right + 8, y + 11, bar.value))
    return _svg(title, height, out)


class _Frame:
    """Where values lie in a chart with axes; a range of nothing is widened."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self._left, self._right = (left, right) if right > left else (left - 1, left + 1)
        self._low, self._high = (low, high) if high > low else (low - 0.5, low + 0.5)

    def x(self, value: float) -> float:
        return _LEFT + (value - self._left) / (self._right - self._left) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self._low) / (self._high - self._low) * (HEIGHT - _TOP - _BOTTOM)

    def grid(self, show: Format, *, over_steps: bool = True) -> str:
        out = []
        for tick in ticks(self._low, self._high):
            at = self.y(tick)
            out.append(f'<path d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}" stroke="{LIGHT}"/>')
            out.append(_text(_LEFT - 7, at + 4, show(tick), "end"))
        if over_steps:
            for tick in ticks(self._left, self._right, 6):
                if tick == int(tick) and tick >= 0:
                    at = self.x(tick)
                    out.append(f'<path d="M{at:.1f} {HEIGHT - _BOTTOM}v4" stroke="{GREY}"/>')
                    out.append(_text(at, HEIGHT - _BOTTOM + 16, number(tick), "middle"))
            out.append(_text((WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 5, "step", "middle"))
        return "".join(out)


def _bounds(values: Sequence[float], bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * ((high if bounds[1] is None else bounds[1]) - (low if bounds[0] is None else bounds[0]))
    margin = margin or 0.1 * abs(high) or 0.5
    return (low - margin if bounds[0] is None else bounds[0]), (high + margin if bounds[1] is None else bounds[1])


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"
