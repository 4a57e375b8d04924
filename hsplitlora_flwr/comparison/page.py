"""Runs side by side as a page for people to read, as of a sweep or a comparison: one file, which needs no network.

what ran            every run with its axes and figures, and the Pareto fronts that it is on
what quality costs  perplexity over memory, bytes, seconds and the size of the adapter, each with its front
over an axis        every figure over every setting in which the runs differ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from hsplitlora_flwr.comparison.files import write
from hsplitlora_flwr.comparison.points import (
    COSTS,
    FIGURES,
    QUALITY,
    Point,
    axes_of,
    fronts,
    number_of,
    pareto_front,
    place,
    to_csv,
)
from hsplitlora_flwr.reporting.page import COLOURS, ticks
from hsplitlora_flwr.reporting.template import page

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 40
_FRONT = "#d1632a"
_LONGEST_LABEL = 14
_LEAST_SPREAD = 0.02


def write_points(points: Sequence[Point], folder: Path, name: str, title: str) -> None:
    """Write ``NAME.html`` and ``NAME.csv``; a reader sees the old ones or the new ones, never a half."""
    write(folder / f"{name}.html", points_page(points, title))
    write(folder / f"{name}.csv", to_csv(points))


def points_page(points: Sequence[Point], title: str) -> str:
    """The page as HTML. Every text in it is escaped."""
    axes, on_front = axes_of(points), fronts(points)
    finished = [point for point in points if point.figures]
    known = [name for name in FIGURES if any(name in point.figures for point in finished)]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        title=title,
        axes=axes,
        figures={name: FIGURES[name] for name in known},
        points=points,
        on_front={name: ", ".join(_short(cost) for cost in costs if cost in known) for name, costs in on_front.items()},
        counts=_counts(points),
        best=min((p for p in finished if QUALITY in p.figures), key=lambda p: p.figures[QUALITY], default=None),
        unmeasured=any(not point.measured for point in finished),
        costs=[scatter(finished, cost, QUALITY, front=True) for cost in COSTS if cost in known],
        over=[
            (axis, legend(finished, axis, axes), [scatter(finished, axis, name, others=axes) for name in known])
            for axis in axes
        ],
    )


def _counts(points: Sequence[Point]) -> str:
    """Such as "4 runs: 3 finished, 1 failed"."""
    states = [point.status for point in points]
    listed = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(points)} run{'s' * (len(points) != 1)}: {listed}"


def _short(name: str) -> str:
    return FIGURES[name].title.partition(",")[0]


@dataclass(frozen=True)
class _Scale:
    """From values to pixels along one side of a picture."""

    low: float
    high: float
    first: float
    last: float
    marks: Sequence[tuple[float, str]]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low or 1.0)
        return round(self.first + share * (self.last - self.first), 1)

    @classmethod
    def of_numbers(cls, values: Sequence[float], first: float, last: float) -> _Scale:
        low, high = min(values), max(values)
        if high - low < _LEAST_SPREAD * abs(high):  # what is nearly the same is to look so
            room = _LEAST_SPREAD * (abs(high) or 1.0)
            low, high = low - room, high + room
        marks = ticks((low, high), number=4)
        return cls(marks[0], marks[-1], first, last, [(mark, f"{mark:g}") for mark in marks])

    @classmethod
    def of_names(cls, names: Sequence[str], first: float, last: float) -> _Scale:
        shown = [name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…" for name in names]
        return cls(-0.5, len(names) - 0.5, first, last, [(float(i), name) for i, name in enumerate(shown)])


def scatter(
    points: Sequence[Point], across: str, up: str, *, front: bool = False, others: Sequence[str] = ()
) -> Markup:
    """Points as SVG, each with a link to its run's page; empty where none has a place.

    Parameters
    ----------
    points : Sequence[Point]
    across, up : str
        A figure or an axis, and a figure. An axis whose values are not all numbers has a place for each value.
    front : bool
        Draw the Pareto front.
    others : Sequence[str]
        Axes; points that are alike in all of these but ``across`` are joined.
    """
    points = [point for point in points if up in point.figures and (across in FIGURES or across in point.axes)]
    if across in FIGURES:
        points = [point for point in points if across in point.figures]
    if not points:
        return Markup("")
    names = list(dict.fromkeys(point.axes.get(across, "") for point in points))
    named = across not in FIGURES and any(number_of(name) is None for name in names)
    unit = FIGURES[across].unit if across in FIGURES else 1.0

    def at(point: Point) -> tuple[float, float]:
        x = float(names.index(point.axes[across])) if named else (place(point, across) or 0.0) / unit
        return x, point.figures[up] / FIGURES[up].unit

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    places = [at(point) for point in points]
    x_scale = (
        _Scale.of_names(names, _LEFT, right)
        if named
        else _Scale.of_numbers([x for x, _ in places], _LEFT + 8, right - 8)
    )
    y_scale = _Scale.of_numbers([y for _, y in places], bottom, _TOP)
    parts = [_frame(x_scale, y_scale)]
    lines = {} if front else _joined(points, across, others)
    for colour, line in zip(COLOURS, lines.values() if not named else (), strict=False):
        parts.append(_line([at(point) for point in line], x_scale, y_scale, colour, ""))
    best = pareto_front(points, across) if front else []
    if len(best) > 1:
        parts.append(_line([at(point) for point in best], x_scale, y_scale, _FRONT, "Pareto front"))
    colours = {id(point): colour for colour, line in zip(COLOURS, lines.values(), strict=False) for point in line}
    parts += [
        _dot(point, x_scale(at(point)[0]), y_scale(at(point)[1]), colours.get(id(point), COLOURS[0]), point in best)
        for point in points
    ]
    x_title = FIGURES[across].title if across in FIGURES else _axis_title(across, names)
    label = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>')
    parts.append(label.format(right, _HEIGHT - 4, x_title))
    svg = Markup(
        '<figure><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" fill="currentColor" font-size="11" role="img">'
        "{}</svg></figure>"
    )
    return svg.format(FIGURES[up].title, _WIDTH, _HEIGHT, Markup("").join(parts))


def _axis_title(axis: str, names: Sequence[str]) -> str:
    lists = any("," in name for name in names) and all(number_of(name) is not None for name in names)
    return f"{axis}, mean of the list" if lists else axis


def _joined(points: Sequence[Point], across: str, others: Sequence[str]) -> dict[str, list[Point]]:
    """Points that differ in ``across`` alone, in its order, by what the others are."""
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: place(point, across) or 0.0):
        rest = (f"{axis}={point.axes.get(axis, '-')}" for axis in others if axis != across)
        lines.setdefault(", ".join(rest), []).append(point)
    return lines


def legend(points: Sequence[Point], across: str, others: Sequence[str]) -> Markup:
    """What the colours of the pictures over an axis mean; empty where there is one."""
    lines = _joined(points, across, others)
    if len(lines) < 2:
        return Markup("")
    entry = Markup('<span><i style="background:{}"></i>{}</span>')
    shown = [entry.format(colour, text) for colour, text in zip(COLOURS, lines, strict=False)]
    if len(lines) > len(COLOURS):
        shown.append(Markup("<span>{} more in the first colour</span>").format(len(lines) - len(COLOURS)))
    return Markup('<p class="legend">{}</p>').format(Markup("").join(shown))


def _frame(x_scale: _Scale, y_scale: _Scale) -> Markup:
    """Grid and labels."""
    right, bottom, parts = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, []
    for value, text in y_scale.marks:
        y = y_scale(value)
        grid = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(grid.format(_LEFT, right, y, y))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(_LEFT - 6, y + 4, text))
    for value, text in x_scale.marks:
        label = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
        parts.append(label.format(x_scale(value), bottom + 16, text))
    return Markup("").join(parts)


def _line(places: Sequence[tuple[float, float]], x_scale: _Scale, y_scale: _Scale, colour: str, title: str) -> Markup:
    path = " ".join(f"{x_scale(x)},{y_scale(y)}" for x, y in places)
    dashes = Markup(' stroke-dasharray="5 4"') if title else ""
    drawn = Markup('<polyline points="{}" stroke="{}" stroke-width="1.5" fill="none"{}><title>{}</title></polyline>')
    return drawn.format(path, colour, dashes, title)


def _dot(point: Point, x: float, y: float, colour: str, best: bool) -> Markup:
    told = [f"run {point.name}", *(f"{key}={value}" for key, value in point.axes.items())]
    told += [f"{FIGURES[name].title}: {FIGURES[name].shown(value)}" for name, value in point.figures.items()]
    ring = Markup(' stroke="{}" stroke-width="2.5"').format(_FRONT) if best else ""
    dot = Markup('<circle cx="{}" cy="{}" r="5" fill="{}"{}><title>{}</title></circle>')
    drawn = dot.format(x, y, colour, ring, "\n".join(told))
    return Markup('<a href="{}">{}</a>').format(point.page, drawn) if point.page else drawn


_STYLE = """\
body { max-width: 90rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; }
figure svg { width: 100%; }
figcaption { font-weight: 600; font-size: .9rem; color: var(--soft); }
tr.front td { background: #d1632a18; }
"""

_TEMPLATE = page(
    "{{ title }}",
    """\
<h1>{{ title }}</h1>
<p class="soft">{{ counts }}</p>
{% if best %}
<p class="big">lowest perplexity {{ figures.perplexity.shown(best.figures.perplexity) }}{% if axes %}
 <span class="soft">with
{% for axis in axes %}{{ axis }}={{ best.axes[axis] | default("-") }}{{ ", " if not loop.last }}{% endfor %}
</span>{% endif %}</p>
{% endif %}

<h2>What ran</h2>
<div class="wide"><table>
<tr><th>run</th>{% for axis in axes %}<th>{{ axis }}</th>{% endfor %}
{% for figure in figures.values() %}<th>{{ figure.title }}</th>{% endfor %}<th class="text">on the front of</th></tr>
{% for point in points %}
<tr{% if on_front[point.name] %} class="front"{% endif %}>
<td>{% if point.page %}<a href="{{ point.page }}">{{ point.name }}</a>{% else %}{{ point.name }}{% endif %}</td>
{% for axis in axes %}<td>{{ point.axes[axis] | default("-") }}</td>{% endfor %}
{% if point.figures %}
{% for name, figure in figures.items() %}<td>{{ figure.shown(point.figures.get(name)) }}
{%- if name == "peak_bytes" and not point.measured %}*{% endif %}</td>{% endfor %}
<td class="text">{{ on_front[point.name] }}</td>
{% else %}
<td class="text" colspan="{{ figures | length + 1 }}">{{ point.status }}{{ ": " if point.cause }}
{{- point.cause | truncate(160) }}</td>
{% endif %}
</tr>
{% endfor %}
</table></div>
<p class="soft">On the front of a cost: no other run has a lower perplexity for no more of it.
{% if unmeasured %}* As planned: clients that share a process do not measure their own memory.{% endif %}</p>

{% if costs %}
<h2>What quality costs</h2>
<p class="soft">The dashed line is the Pareto front; a point leads to its run.</p>
<div class="pictures">{% for picture in costs %}{{ picture }}{% endfor %}</div>
{% endif %}
{% for axis, legend, pictures in over %}
<h2>Over {{ axis }}</h2>
{{ legend }}
<div class="pictures">{% for picture in pictures %}{{ picture }}{% endfor %}</div>
{% endfor %}
""",
    _STYLE,
)
