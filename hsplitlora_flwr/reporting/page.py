"""``report.html``: a run for people to read. One file, which needs no network and nothing beside it.

what came out       perplexity by round, the files, texts before and after, scores of generated texts
who held what       every client's split, ranks and memory: its budget, as planned, as measured
where ranks went    a cell for every weight of every client, and how much each weight matters
what it took        losses, time and bytes of every round, and by client
made with           settings and versions
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import Environment, Template
from markupsafe import Markup

from hsplitlora_flwr.reporting.template import TEMPLATE

PAGE_FILE = "report.html"
MAX_CLIENTS = 40
"""Clients, and failures of clients, with a row of their own; ``summary.json`` has all of them."""
MAX_BARS = 20
"""Clients with a bar of their own."""
MAX_SIBLINGS = 20
MAX_MAPS = 8
"""Clients whose ranks are drawn."""
_DOTS, _VALUES = 30, 150  # points of a line that are drawn as dots; and those, at most, that the mouse finds
COLOURS = ("#2f6fb0", "#d1632a", "#3f8f4f", "#9a4fb0", "#b08a1e", "#2a9aa0", "#b03a5b", "#6b6f76")

Series = Mapping[str, Sequence[tuple[float, float]]]


class Cell(NamedTuple):
    """A weight in a map: what it says, and how strong its colour is, from 0 to 1."""

    text: str
    share: float


def write_page(summary: Mapping[str, Any], folder: Path) -> None:
    """Write the page of a run; a reader sees the old one or the new one, never a half.

    Parameters
    ----------
    summary : Mapping
        The content of ``summary.json``, of a run in any state.
    folder : Path
        The run folder.
    """
    draft = folder / f"{PAGE_FILE}.part"
    draft.write_text(page(summary, links(folder)), encoding="utf-8")
    draft.replace(folder / PAGE_FILE)


def links(folder: Path) -> dict[str, list[str]]:
    """What else there is to look at, relative to a run folder: its logs and checkpoints, and the runs beside it."""
    beside = sorted(other.parent for other in folder.absolute().parent.glob(f"*/{PAGE_FILE}"))
    siblings = [other.name for other in beside if other != folder.absolute() and not other.is_symlink()]
    return {
        "logs and checkpoints": [name for name in _BESIDE if (folder / name).exists()],
        "runs beside this one": [f"../{name}/{PAGE_FILE}" for name in siblings[-MAX_SIBLINGS:]],
    }


_BESIDE = ("summary.json", "events.jsonl", "flwr.log", "run.log", "superlink.log", "checkpoints", "best/adapter")


def page(summary: Mapping[str, Any], links: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """The page of a run as HTML. Every text in it is escaped: names of clients and errors come from other machines.

    Parameters
    ----------
    summary : Mapping
        As for :func:`write_page`.
    links : Mapping[str, Sequence[str]]
        What is beside the page, by a heading.
    """
    rounds, plans = summary["rounds"], summary.get("plans", [])
    plan = plans[-1] if plans else {"clients": []}
    drawn = [client for client in plan["clients"] if client.get("ranks")]
    return _template().render(
        summary=summary,
        config=summary["config"],
        started=time.strftime("%Y-%m-%d %H:%M", time.localtime(summary["started"])),
        perplexity=line_chart({"held-out text": _perplexities(summary)}, "round", "perplexity"),
        losses=line_chart(_losses(rounds), "step", "loss, nats a token"),
        memory=bar_chart(_memory(plan, rounds), ("budget", "planned", "measured peak"), "GB"),
        times=bar_chart(_times(rounds), _TIMES, "s", stacked=True),
        traffic=bar_chart(_traffic(rounds), ("up", "down"), "MB", stacked=True),
        measuring=sum(row.get("evaluation_seconds", 0.0) for row in rounds),
        texts=summary.get("texts", []),
        links={name: places for name, places in links.items() if places},
        files=[name for name in summary.get("results", []) if name != PAGE_FILE],
        rounds=[_round_row(row, plans) for row in rounds],
        clients=[_client_row(client, rounds) for client in _clients(plan, rounds)[:MAX_CLIENTS]],
        more_clients=max(0, len(_clients(plan, rounds)) - MAX_CLIENTS),
        failures=summary.get("failures", [])[-MAX_CLIENTS:],
        more_failures=max(0, len(summary.get("failures", [])) - MAX_CLIENTS),
        maps=[(f"client {client['client']}", rank_map(client)) for client in drawn[:MAX_MAPS]],
        highest=max((rank for client in drawn for rank in client["ranks"].values()), default=0),
        shades=[(COLOURS[0], _shade(step / 4)) for step in range(5)],
        more_maps=max(0, len(drawn) - MAX_MAPS),
        importance=importance_map(summary.get("importance", {})),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"gb": _gigabytes, "mb": _megabytes, "number": _number}
    return environment.from_string(TEMPLATE)


# ---------------------------------------------------------------------- rows


def _clients(plan: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the last plan, or, where nothing is planned, of the last round."""
    return list(plan["clients"] or (rounds[-1]["clients"] if rounds else []))


def _client_row(client: Mapping[str, Any], rounds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A client as it was planned, beside what its rounds took."""
    own = [row for each in rounds for row in each["clients"] if row["client"] == client["client"]]
    ranks = list(client.get("ranks", {}).values()) if client.get("blocks") else []
    return {
        **client,
        "mean_rank": sum(ranks) / len(ranks) if ranks else None,
        "trained": len(own),
        "measured_bytes": max((row["measured_bytes"] for row in own), default=None),
        "beside_bytes": max((row["host_measured_bytes"] for row in own if row.get("host_process_bytes")), default=None),
        "tokens_per_second": sum(row["tokens_per_second"] for row in own) / len(own) if own else None,
        "loss": own[-1]["losses"][-1] if own and own[-1]["losses"] else None,
    }


def _round_row(row: Mapping[str, Any], plans: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    clients = row["clients"]
    return {
        **row,
        "clients": len(clients),
        "bytes_up": sum(client["bytes_up"] for client in clients),
        "bytes_down": sum(client["bytes_down"] for client in clients),
        "planned": next((plan["reason"] or "first plan" for plan in plans if plan["round"] == row["round"]), ""),
    }


_TIMES = ("process and messages", "reading the model", "steps")
"""What the seconds of a client went into; in those of its steps it also waits, for its turn and for what travels."""


def _sums(rounds: Iterable[Mapping[str, Any]], *keys: str) -> dict[str, list[float]]:
    """Sums over the rounds of every client."""
    found: dict[str, list[float]] = {}
    for row in (row for each in rounds for row in each["clients"]):
        before = found.get(row["client"], [0.0] * len(keys))
        found[row["client"]] = [total + float(row.get(key) or 0) for total, key in zip(before, keys, strict=True)]
    return dict(list(found.items())[:MAX_BARS])


def _times(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return _sums(rounds, "seconds_around", "seconds_before", "seconds")


def _traffic(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {name: [size / 1e6 for size in sizes] for name, sizes in _sums(rounds, "bytes_up", "bytes_down").items()}


def _memory(plan: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    rows = [_client_row(client, rounds) for client in _clients(plan, rounds)[:MAX_BARS]]
    keys = ("budget_bytes", "predicted_bytes", "measured_bytes")
    return {
        row["client"]: [float(row.get(key) or 0) / 1e9 for key in keys] for row in rows if row.get("measured_bytes")
    }


def _perplexities(summary: Mapping[str, Any]) -> list[tuple[float, float]]:
    found = [(0.0, summary["perplexity_before"])]
    found += [(float(row["round"]), row.get("perplexity")) for row in summary["rounds"]]
    return [(server_round, value) for server_round, value in found if value is not None]


def _losses(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Every client's losses over the steps of the run; a round that a client missed is a gap in its steps."""
    found: dict[str, list[tuple[float, float]]] = {}
    first = 1
    for row in rounds:
        for client in row["clients"]:
            points = found.setdefault(f"client {client['client']}", [])
            points += ((float(first + index), loss) for index, loss in enumerate(client["losses"]))
        first += max((len(client["losses"]) for client in row["clients"]), default=0)
    return dict(list(found.items())[: len(COLOURS)])


# ---------------------------------------------------------------------- pictures


def line_chart(series: Series, title: str, height_title: str = "", width: int = 960, height: int = 280) -> Markup:
    """Lines over a common axis as SVG; empty where there are not two points to join.

    Parameters
    ----------
    series : Mapping[str, Sequence[tuple[float, float]]]
        Points by the name that the legend has. A value that is not finite is left out.
    title, height_title : str
        Of the axes, with the unit.
    width, height : int
        Pixels.
    """
    lines = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    points = [point for line in lines.values() for point in line]
    if len(points) < 2:
        return Markup("")
    left, right, top, bottom = 48, 12, 12, 34
    x_ticks, y_ticks = ticks((x for x, _ in points), whole=True), ticks(y for _, y in points)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1) * (width - left - right) + left
        return round(across, 1), round(height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom), 1)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        grid = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(grid.format(left, width - right, y, y))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 6, y + 4, f"{tick:g}"))
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        label = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
        parts.append(label.format(x, height - bottom + 16, f"{tick:g}"))
    parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(width - right, height - 4, title))
    if height_title:
        turned = Markup('<text x="{}" y="{}" text-anchor="end" transform="rotate(-90 {} {})">{}</text>')
        parts.append(turned.format(10, top, 10, top, height_title))
    for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in line))
        drawn = Markup('<polyline points="{}" stroke="{}" stroke-width="2" fill="none"><title>{}</title></polyline>')
        parts.append(drawn.format(path, colour, name))
        dot = Markup('<circle cx="{}" cy="{}" r="{}" fill="{}" fill-opacity="{}"><title>{}</title></circle>')
        size = (3, 1) if len(line) <= _DOTS else (6, 0)  # of many, one sees the line alone and finds values on it
        for x, y in line[:: -(-len(line) // _VALUES)]:
            parts.append(dot.format(*place(x, y), size[0], colour, size[1], f"{name}, {title} {x:g}: {y:.4g}"))
    legend = Markup("").join(
        Markup('<span><i style="background:{}"></i>{}</span>').format(colour, name)
        for colour, name in zip(COLOURS, lines, strict=False)
    )
    return _picture(width, height, parts) + Markup('<p class="legend">{}</p>').format(legend)


def bar_chart(
    rows: Mapping[str, Sequence[float]], names: Sequence[str], unit: str, *, stacked: bool = False, width: int = 960
) -> Markup:
    """Bars to the right as SVG, a row a client; empty where there is none above zero.

    Parameters
    ----------
    rows : Mapping[str, Sequence[float]]
        Values by client, in the order of ``names``.
    names : Sequence[str]
        What the values are, for the legend.
    unit : str
        Of all of them.
    stacked : bool
        One after another, as they add up; else one below another.
    width : int
        Pixels.
    """
    highest = max((sum(values) if stacked else max(values) for values in rows.values()), default=0.0)
    if highest <= 0:
        return Markup("")
    names = names[: max(map(len, rows.values()))]
    left, right, thick, gap = 90, 90, (14 if stacked else 7), 8
    high = thick if stacked else thick * len(names)
    parts = []
    for number, (client, values) in enumerate(rows.items()):
        top, at = 4 + number * (high + gap), 0.0
        label = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>')
        parts.append(label.format(left - 6, top + high / 2 + 4, f"client {client}"[:14]))
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            shape = Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="{}"><title>{}</title></rect>')
            x = left + at / highest * (width - left - right)
            y = top if stacked else top + place * thick
            long = max(value, 0.0) / highest * (width - left - right)
            title = f"client {client}, {name}: {value:.3g} {unit}"
            parts.append(shape.format(round(x, 1), y, round(long, 1), thick - 1, COLOURS[place], title))
            at += max(value, 0.0) if stacked else 0.0
        told = sum(values) if stacked else max(values)
        end = left + told / highest * (width - left - right) + 6
        parts.append(
            Markup('<text x="{}" y="{}">{}</text>').format(round(end, 1), top + high / 2 + 4, f"{told:.3g} {unit}")
        )
    legend = Markup("").join(
        Markup('<span><i style="background:{}"></i>{}</span>').format(colour, f"{name}, {unit}")
        for colour, name in zip(COLOURS, names, strict=False)
    )
    picture = _picture(width, 4 + len(rows) * (high + gap), parts)
    return picture + Markup('<p class="legend">{}</p>').format(legend)


def ticks(values: Iterable[float], *, whole: bool = False, number: int = 5) -> list[float]:
    """About ``number`` round values that span all of ``values``; ``whole`` keeps to integers within them."""
    found = list(values)
    low, high = min(found), max(found)
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [round(n * step, 12) for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def rank_map(client: Mapping[str, Any]) -> Markup:
    """Ranks of a client's weights: a column for every block, with a line where the model is cut."""
    highest = max([*client["ranks"].values(), 1])
    cells = {name: Cell(f"rank {rank}", rank / highest) for name, rank in client["ranks"].items()}
    return _weight_map(cells, client.get("split"))


def importance_map(importance: Mapping[str, float]) -> Markup:
    """How much every weight matters, as a share of the one that matters most; empty if all are the same."""
    if len(set(importance.values())) < 2:
        return Markup("")
    most = max(importance.values())
    return _weight_map({name: Cell(f"{value:.4g}", value / most) for name, value in importance.items()})


def _weight_map(cells: Mapping[str, Cell], split: int | None = None) -> Markup:
    size = 14  # pixels from one weight to the next
    places = {name: where for name in cells if (where := _block_and_kind(name))}
    blocks = sorted({block for block, _ in places.values()})
    kinds = sorted({kind for _, kind in places.values()})
    if not blocks:
        return Markup("")
    left = 7 * max(len(kind) for kind in kinds) + 10
    parts = []
    for row, kind in enumerate(kinds):
        label = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>')
        parts.append(label.format(left - 6, (row + 1) * size - 3, kind))
    for name, (block, kind) in places.items():
        cell, x, y = cells[name], left + blocks.index(block) * size, kinds.index(kind) * size
        title = Markup("<title>{}: {}</title>").format(name, cell.text)
        square = Markup('<rect x="{}" y="{}" width="13" height="13" fill="{}" fill-opacity="{}">{}</rect>')
        parts.append(square.format(x, y, COLOURS[0], _shade(cell.share), title))
    for column, block in enumerate(blocks):
        if column % 5 == 0:
            number = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
            parts.append(number.format(left + column * size + 6, len(kinds) * size + 12, block))
    parts.append(Markup('<text x="{}" y="{}" text-anchor="end">block</text>').format(left - 6, len(kinds) * size + 12))
    if split is not None and split <= blocks[-1]:
        edge = left + sum(block < split for block in blocks) * size - 0.5
        cut = Markup('<line x1="{}" x2="{}" y1="0" y2="{}" stroke="{}" stroke-width="2.5"/>')
        parts.append(cut.format(edge, edge, len(kinds) * size, COLOURS[1]))
    return _picture(left + len(blocks) * size, len(kinds) * size + 16, parts)


def _shade(share: float) -> float:
    """The opacity that stands for a share of the most."""
    return round(0.06 + 0.94 * share, 3)


def _picture(width: int, height: int, parts: Iterable[Markup]) -> Markup:
    svg = Markup('<svg width="{}" height="{}" viewBox="0 0 {} {}" fill="currentColor" font-size="11">{}</svg>')
    return svg.format(width, height, width, height, Markup("").join(parts))


def _block_and_kind(name: str) -> tuple[int, str] | None:
    """``model.layers.3.self_attn.q_proj`` -> 3 and ``self_attn.q_proj``."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if index is None else (int(parts[index]), ".".join(parts[index + 1 :]))


# ---------------------------------------------------------------------- figures


def _gigabytes(size: float | None) -> str:
    return f"{size / 1e9:.2f} GB" if size else "-"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size else "-"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
