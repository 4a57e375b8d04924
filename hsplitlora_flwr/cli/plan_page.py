"""``plan.html``: a forecast as a picture, for whoever buys or lends the machines.

who holds what      a row a client: its blocks and the server's, and its memory by what is in it, up to its budget
seconds of a round  where speeds are stated: what each client's part of a round takes
other budgets       what a client alone would do with more and with less memory, and what each step up gains
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from jinja2 import Environment
from markupsafe import Markup

from hsplitlora_flwr.cli.forecast import PARTS, Forecast
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.planning.planner import ClientPlan
from hsplitlora_flwr.reporting.events import format_bytes
from hsplitlora_flwr.reporting.page import COLOURS, MAX_CLIENTS, line_chart
from hsplitlora_flwr.reporting.template import page

_WIDTH, _HEIGHT = 620, 16
_OF_CLIENT, _OF_SERVER = COLOURS[0], "#8a909a"


def plan_page(result: Forecast, others: Mapping[float, Forecast | str]) -> str:
    """The page as HTML. Every text in it is escaped.

    Parameters
    ----------
    result : Forecast
    others : Mapping[float, Forecast or str]
        A client alone, by its memory in GB, ascending; or why there is no plan for it.
    """
    plan, timed = result.plan, result.timed
    most = max(max(result.budgets[name].memory_bytes, each.predicted_bytes) for name, each in plan.clients.items())
    slowest = max((client.predicted_seconds for client in plan.clients.values()), default=0.0)
    planned = {gb: each for gb, each in others.items() if isinstance(each, Forecast)}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": format_bytes}
    return environment.from_string(_TEMPLATE).render(
        title=f"Plan: {result.config.model.path}",
        about=result.about,
        importance=result.of_importance,
        process=result.process,
        server=plan.server_bytes if METHODS[result.config.method.name].split else 0,
        worth=result.worth[:1].upper() + result.worth[1:],
        clients=[
            {
                "name": name,
                "budget": result.budgets[name].memory_bytes,
                "plan": each,
                "rank": _mean_rank(each),
                "blocks": _blocks(each.split, result.cost.num_blocks),
                "memory": _memory(result, name, each, most),
                "seconds": _bar([("", each.predicted_seconds, _OF_CLIENT)], slowest or 1.0),
            }
            for name, each in list(plan.clients.items())[:MAX_CLIENTS]
        ],
        more=max(0, len(plan.clients) - MAX_CLIENTS),
        left_out=plan.left_out,
        parts=list(zip(PARTS, COLOURS, strict=False)),
        timed=timed,
        seconds=plan.seconds,
        rows=[_row(gb, each) for gb, each in others.items()],
        gains=gains(planned),
        curves=[
            (title, line_chart({title: [(gb, value(each)) for gb, each in planned.items()]}, "GB of a client"))
            for title, value in _CURVES.items()
            if title != "seconds of a round" or timed
        ],
    )


def gains(planned: Mapping[float, Forecast]) -> list[str]:
    """What each budget gains over the one below it, in words."""
    steps = list(planned.items())
    return [_gain(*less, *more) for less, more in itertools.pairwise(steps)]


def _gain(less: float, before: Forecast, more: float, after: Forecast) -> str:
    then, now = _only(before), _only(after)
    worth = after.plan.objective / before.plan.objective - 1 if before.plan.objective else 0.0
    sooner = before.timed and after.plan.seconds < 0.995 * before.plan.seconds
    later = before.timed and before.plan.seconds < 0.995 * after.plan.seconds
    seconds = f"a round of {after.plan.seconds:.3g} s instead of {before.plan.seconds:.3g} s"
    gained = {
        "a client that trains": then.forward_only and not now.forward_only,
        f"a plan worth {worth:.1%} more": worth >= 0.001,
        seconds: sooner,
    }
    beside = {
        f"{now.split} blocks on the client instead of {then.split}": now.split != then.split,
        f"a mean rank of {_mean_rank(now):.1f} instead of {_mean_rank(then):.1f}": abs(
            _mean_rank(now) - _mean_rank(then)
        )
        >= 0.05,
        seconds: later,
    }
    said = ", ".join(text for text, so in gained.items() if so) or "nothing"
    how = ", ".join(text for text, so in beside.items() if so)
    return f"With {more:g} GB instead of {less:g} you gain {said}" + (f": {how}." if how else ".")


def _only(result: Forecast) -> ClientPlan:
    [client] = result.plan.clients.values()
    return client


def _mean_rank(client: ClientPlan) -> float:
    return fmean(client.ranks.values()) if client.ranks else 0.0


_CURVES: Mapping[str, Callable[[Forecast], float]] = {
    "blocks on the client": lambda result: float(_only(result).split),
    "mean rank": lambda result: _mean_rank(_only(result)),
    "seconds of a round": lambda result: float(result.plan.seconds),
}


def _row(gb: float, found: Forecast | str) -> dict[str, object]:
    if isinstance(found, str):
        return {"gb": gb, "why": found}
    return {"gb": gb, "plan": _only(found), "rank": _mean_rank(_only(found)), "found": found.plan}


def _blocks(split: int, blocks: int) -> Markup:
    """A cell for every block, the client's in a colour of their own."""
    size = _WIDTH / blocks
    cell = Markup('<rect x="{}" y="0" width="{}" height="{}" fill="{}"><title>block {}: {}</title></rect>')
    cells = (
        cell.format(
            round(size * block, 1),
            round(size - 1, 1),
            _HEIGHT,
            _OF_CLIENT if block < split else _OF_SERVER,
            block,
            "client" if block < split else "server",
        )
        for block in range(blocks)
    )
    return _picture(Markup("").join(cells))


def _memory(result: Forecast, name: str, client: ClientPlan, most: int) -> Markup:
    """What is in a client's memory, and a mark at its budget."""
    budget, cost = result.budgets[name], result.cost
    if client.split == cost.num_blocks:  # the cost model takes the memory of a part of the model apart
        parts = {"weights": client.predicted_bytes}
    else:
        parts = cost.memory_parts(client.split, client.ranks, budget.process_bytes, checkpointing=client.checkpointing)
    colours = dict(zip(PARTS, COLOURS, strict=False))
    return _bar([(part, size, colours[part]) for part, size in parts.items()], most, budget.memory_bytes)


def _bar(parts: Sequence[tuple[str, float, str]], most: float, mark: float | None = None) -> Markup:
    drawn, x = [], 0.0
    for name, size, colour in parts:
        width = size / most * _WIDTH
        title = f"{name}: {format_bytes(int(size))}" if name else ""
        part = Markup('<rect x="{}" y="0" width="{}" height="{}" fill="{}"><title>{}</title></rect>')
        drawn.append(part.format(round(x, 1), round(width, 1), _HEIGHT, colour, title))
        x += width
    if mark is not None:
        place = min(round(mark / most * _WIDTH, 1), _WIDTH - 1.5)
        line = Markup('<rect x="{}" y="0" width="1.5" height="{}" fill="currentColor"><title>budget</title></rect>')
        drawn.append(line.format(place, _HEIGHT))
    return _picture(Markup("").join(drawn))


def _picture(content: Markup) -> Markup:
    svg = Markup('<svg width="{}" height="{}" viewBox="0 0 {} {}" fill="currentColor" role="img">{}</svg>')
    return svg.format(_WIDTH, _HEIGHT, _WIDTH, _HEIGHT, content)


_TEMPLATE = page(
    "{{ title }}",
    """\
<h1>{{ title }}</h1>
<p class="soft">{{ about }}. Importance: {{ importance }}. A client's process takes
{{ process.bytes | bytes }} by itself ({{ process.source }}).</p>
<p>{% if server %}The server takes {{ server | bytes }}. {% endif %}
{% if timed %}A round takes {{ "%.3g" | format(seconds) }} s.
{% endif %}{{ worth }}</p>

<h2>Who holds what</h2>
<p class="legend"><span><i style="background:"""
    + _OF_CLIENT
    + """"></i>on the client</span>
<span><i style="background:"""
    + _OF_SERVER
    + """"></i>on the server</span></p>
<div class="wide"><table>
<tr><th>client</th><th>blocks</th><th>mean rank</th><th></th></tr>
{% for client in clients %}
<tr><td>{{ client.name }}</td>
<td>{{ client.plan.split }}{{ ", forward alone" if client.plan.forward_only }}</td>
<td>{{ "%.1f" | format(client.rank) }}</td><td>{{ client.blocks }}</td></tr>
{% endfor %}
</table></div>
{% for name, missing in left_out.items() %}
<p class="failed">client {{ name }} is left out: it misses {{ missing | bytes }}</p>
{% endfor %}
{% if more %}<p class="soft">and {{ more }} more</p>{% endif %}

<h2>Memory of a client</h2>
<p class="legend">
{% for part, colour in parts %}<span><i style="background:{{ colour }}"></i>{{ part }}</span>{% endfor %}
<span>| budget</span></p>
<div class="wide"><table>
<tr><th>client</th><th>budget</th><th>takes</th><th></th></tr>
{% for client in clients %}
<tr><td>{{ client.name }}</td><td>{{ client.budget | bytes }}</td><td>{{ client.plan.predicted_bytes | bytes }}</td>
<td>{{ client.memory }}</td></tr>
{% endfor %}
</table></div>

{% if timed %}
<h2>Seconds of a round</h2>
<div class="wide"><table>
<tr><th>client</th><th>its own part</th><th></th></tr>
{% for client in clients %}
<tr><td>{{ client.name }}</td><td>{{ "%.3g" | format(client.plan.predicted_seconds) }} s</td>
<td>{{ client.seconds }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

{% if rows %}
<h2>Other budgets</h2>
<p class="soft">A client alone, with so much memory.</p>
<div class="wide"><table>
<tr><th>GB</th><th>blocks</th><th>mean rank</th><th>takes</th><th>the server</th>
{% if timed %}<th>round</th>{% endif %}</tr>
{% for row in rows %}
<tr><td>{{ "%g" | format(row.gb) }}</td>
{% if row.why %}
<td class="text" colspan="{{ 5 if timed else 4 }}">{{ row.why }}</td>
{% else %}
<td>{{ row.plan.split }}{% if row.plan.forward_only %}, forward alone{% endif %}</td>
<td>{{ "%.1f" | format(row.rank) }}</td><td>{{ row.plan.predicted_bytes | bytes }}</td>
<td>{{ row.found.server_bytes | bytes }}</td>
{% if timed %}<td>{{ "%.3g" | format(row.found.seconds) }} s</td>{% endif %}
{% endif %}
</tr>
{% endfor %}
</table></div>
{% if gains %}
<ul>{% for gain in gains %}<li>{{ gain }}</li>{% endfor %}</ul>
{% endif %}
{% for title, curve in curves if curve %}
<h3>{{ title }}</h3>
{{ curve }}
{% endfor %}
{% endif %}
""",
    "td svg { display: block; }\ntd.text { white-space: normal; }\n",
)
