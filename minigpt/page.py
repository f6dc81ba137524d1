"""Pieces of a self-contained HTML page: tables and charts as inline SVG, light and dark.

Nothing is fetched: no script, no font, no style sheet. Texts that are not `Html` are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

COLOURS = 6  # then the dashes change
MAX_POINTS = 300  # of a line; more only make the file larger
WIDTH, HEIGHT = 440, 230  # of a line chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 38  # its margins

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c1d21; --soft: #5d6068;
  --line: #e3e3e0; --c0: #2563c9; --c1: #c2560a; --c2: #17805a; --c3: #8a3fb0; --c4: #b3261e;
  --c5: #0b7285; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1c1e22; --ink: #e9e9e6;
  --soft: #a4a8b1; --line: #33363d; --c0: #7aa8ff; --c1: #f2a25c; --c2: #5fcf9f; --c3: #c79bf0;
  --c4: #ff8a80; --c5: #5cc8d8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.5rem; font-size: 1.3rem; }
h3 { font-size: 1.05rem; } figcaption { font-weight: 600; font-size: .95rem; }
p.soft, small, .legend { color: var(--soft); } a { color: var(--c0); }
.charts { display: grid; gap: 1rem; margin: 1rem 0; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure, details { margin: 0; padding: .8rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; } details { margin: .6rem 0; }
summary { cursor: pointer; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
@media (max-width: 30rem) { svg text { font-size: 14px; } }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
  border-radius: .2rem; }
.bars { display: grid; grid-template-columns: fit-content(45%) 1fr max-content; gap: .35rem .6rem;
  align-items: center; margin-top: .5rem; font-size: .85rem; }
.bars span { text-align: right; color: var(--soft); overflow-wrap: anywhere; }
.bars b { font-weight: 400; } .bars div { position: relative; height: 1rem; }
.bars i { display: block; min-width: 1px; height: 100%; background: var(--c0);
  border-radius: .15rem; }
.bars u { position: absolute; top: .25rem; height: .5rem; border: solid var(--ink);
  border-width: 0 1.5px;
  background: linear-gradient(var(--ink), var(--ink)) center / 100% 1.5px no-repeat; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); } th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { overflow-x: auto; font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; }
"""


class Html(str):
    """Markup, whose texts are escaped already."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Return a value as text of a page; `Html` is not escaped again."""
    return text if isinstance(text, Html) else Html(html.escape(number(text)))


def number(value: object) -> str:
    """Write a value for a reader: whole numbers in groups, others to four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def page(title: str, body: str) -> str:
    """Return a whole HTML document.

    Args:
        title: shown in the tab and as the heading.
        body: markup; put texts through `escape`.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """Return a table; a column of numbers stands to the right, and a wide table scrolls."""
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(head))
    ]
    lines = [_row("th", head, numeric), *(_row("td", row, numeric) for row in rows)]
    return Html(f'<div class="scroll"><table>{"".join(lines)}</table></div>')


def _row(tag: str, cells: Sequence[object], numeric: Sequence[bool]) -> str:
    kinds = [' class="n"' if right else "" for right in numeric]
    pairs = zip(cells, kinds, strict=True)
    return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for c, k in pairs) + "</tr>\n"


def charts(figures: Sequence[str]) -> Html:
    """Lay figures out side by side where the screen is wide enough."""
    return Html(f'<div class="charts">{"".join(figures)}</div>')


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / about))
    step = next(s * power for s in (1, 2, 5, 10) if (high - low) / (s * power) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Write a tick briefly: 1500 as 1.5k, 0.00025 as 2.5e-4."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"


def line_chart(
    title: str, series: Mapping[str, Points], x_label: str = "step", y_label: str = ""
) -> Html:
    """Draw lines over a common axis.

    Args:
        title: caption of the figure.
        series: name to (x, y) points in order of x; those that are not finite are left out.
        x_label: what x is, in its unit.
        y_label: what y is, in its unit.
    """
    lines = {name: _thinned(points) for name, points in series.items()}
    all_points = [point for points in lines.values() for point in points]
    if not all_points:
        return _figure(title, '<p class="soft">No points.</p>')
    xs = _range([x for x, _ in all_points])
    ys = _range([y for _, y in all_points])

    def pixels(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    marks = []
    for y in ticks(*ys):
        top = pixels(xs[0], y)[1]
        marks.append(f'<path d="M{LEFT} {top}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
        marks.append(_text(LEFT - 6, top + 4, tick_label(y), "end"))
    for x in ticks(*xs):
        marks.append(_text(pixels(x, ys[0])[0], HEIGHT - BOTTOM + 16, tick_label(x), "middle"))
    marks.append(_text((LEFT + WIDTH) / 2, HEIGHT - 4, x_label, "middle"))
    for index, (name, points) in enumerate(lines.items()):
        label = name if len(lines) > 1 else ""
        marks.append(_line([(*pixels(x, y), x, y) for x, y in points], index, label, x_label))
    unit = f" <small>({escape(y_label)})</small>" if y_label else ""
    box = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    drawing = f"{box}{''.join(marks)}</svg>"
    return _figure(title, (_legend(list(lines)) if len(lines) > 1 else "") + drawing, unit)


def _thinned(points: Points) -> list[tuple[float, float]]:
    """Return the finite points, every n-th one and the last of more than `MAX_POINTS`."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    step = -(-len(finite) // MAX_POINTS) or 1
    return finite[::step] + (finite[-1:] if (len(finite) - 1) % step else [])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis: 0 if the values come near it, else with a margin below."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < high / 4 else low - margin), high + margin


def _line(points: Sequence[tuple[float, ...]], index: int, name: str, x_label: str) -> str:
    """Return a line, and dots that show their numbers; points are (left, top, x, y)."""
    colour = f"var(--c{index % COLOURS})"
    dash = ' stroke-dasharray="5 3"' if index >= COLOURS else ""
    path = "L".join(f"{left} {top}" for left, top, *_ in points)
    line = f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>'
    radius = 2.5 if len(points) <= 12 else 0  # a line of few points shows them
    step = -(-len(points) // 60) or 1
    dots = "".join(
        f'<circle cx="{left}" cy="{top}" r="{radius}" fill="{colour}" stroke="transparent" '
        f'stroke-width="9"><title>{escape(f"{name} " if name else "")}{escape(number(y))} at '
        f"{escape(x_label)} {escape(number(x))}</title></circle>"
        for left, top, x, y in points[::step]
    )
    return line + dots


def bar_chart(
    title: str,
    bars: Sequence[tuple[str, float]],
    *,
    intervals: Sequence[tuple[float, float]] = (),
    largest: float | None = None,
    unit: str = "",
) -> Html:
    """Draw horizontal bars from zero, one below the other.

    Args:
        title: caption of the figure.
        bars: (label, value of at least 0) in the order shown.
        intervals: (low, high) of each bar, drawn over it; none to leave them out.
        largest: value of a full bar; by default the largest there is.
        unit: written after each value.
    """
    full = largest or max([v for _, v in bars] + [high for _, high in intervals], default=0) or 1
    rows = []
    for index, (label, value) in enumerate(bars):
        low, high = (100 * x / full for x in intervals[index]) if intervals else (0, 0)
        whisker = f'<u style="left:{low:.2f}%;width:{high - low:.2f}%"></u>' if intervals else ""
        bar = f'<i style="width:{100 * value / full:.2f}%"></i>{whisker}'
        figure = f"{escape(value)}{escape(unit)}"
        rows.append(f"<span>{escape(label)}</span><div>{bar}</div><b>{figure}</b>")
    return _figure(title, f'<div class="bars">{"".join(rows)}</div>')


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Sequence[str]) -> str:
    marks = (
        f'<span><i style="background:var(--c{i % COLOURS})"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(marks)}</div>'


def _figure(title: str, body: str, unit: str = "") -> Html:
    return Html(f"<figure><figcaption>{escape(title)}{unit}</figcaption>{body}</figure>\n")
