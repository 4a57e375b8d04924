"""The HTML that all pages share, and the template of ``report.html``, for Jinja.

They are Python text because Flower carries no HTML files in an app.
"""

_STYLE = """\
:root { color-scheme: light dark; --ink: #1d2126; --soft: #6a7079; --line: #dfe2e6; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #9aa1ab; --line: #363b42; --back: #17191c; }
}
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1rem 0 .2rem; }
.soft, .legend { color: var(--soft); }
.big { font-size: 1.5rem; }
.failed { border-left: 4px solid #c0392b; padding: .4rem .8rem; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
svg { max-width: 100%; height: auto; }
svg circle:hover, svg rect:hover { stroke: currentColor; fill-opacity: 1; }
.texts td { white-space: pre-wrap; vertical-align: top; min-width: 9rem; }
.legend span { margin-right: 1rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
@media (max-width: 60rem) {
  .wide th, .wide td { padding-right: .35rem; font-size: .75rem; line-height: 1.3; }
  .wide th, .wide td.text, .wide td.words { white-space: normal; vertical-align: bottom; }
  .texts td { min-width: 0; }
  .texts td, .texts td.text { white-space: pre-wrap; vertical-align: top; }
}
"""


def page(title: str, body: str, style: str = "") -> str:
    """The template of a page: title and body in Jinja's language, under the head and the style that all pages have.

    Parameters
    ----------
    title, body : str
        Templates.
    style : str
        What this page has besides.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


TEMPLATE = page(
    '{{ config["method.name"] }}, {{ config["model.path"] }}: {{ summary.status }}',
    """\
<h1>{{ config["method.name"] }} on {{ config["data.source"] }}</h1>
<p class="soft">{{ config["model.path"] }} · {{ started }} · {{ summary.seconds | number(0) }} s ·
{{ rounds | length }} of {{ config["train.rounds"] }} rounds · {{ summary.status }}
{%- if summary.resumed %}
 · goes on after round {{ summary.resumed.after_round }} of {{ summary.resumed.run }}
{%- endif %}</p>

{% if summary.error %}
<p class="failed">{{ summary.error }}</p>
{% endif %}
{% if summary.perplexity_after is not none %}
<p class="big">perplexity {{ summary.perplexity_before | number }} → {{ summary.perplexity_after | number }}</p>
<p class="soft">of {{ summary.held_out_tokens }} tokens that nobody trained on</p>
{% endif %}
{{ perplexity }}
{% if summary.generation %}
<table>
<tr>{% for name in summary.generation %}<th>{{ name }}</th>{% endfor %}</tr>
<tr>{% for score in summary.generation.values() %}<td>{{ score | number(4) }}</td>{% endfor %}</tr>
</table>
{% endif %}
{% if files %}
<p>Files: {% for file in files %}<a href="{{ file }}"><code>{{ file }}</code></a>{{ " " }}{% endfor %}</p>
{% endif %}
{% for name, places in links.items() %}
<p class="soft">{{ name }}: {% for place in places %}<a href="{{ place }}"><code>{{ place }}</code></a>{{ " " }}
{%- endfor %}</p>
{% endfor %}
{% if summary.adapter %}
<pre>model = AutoPeftModelForCausalLM.from_pretrained("{{ summary.adapter.folder }}")  # in this folder</pre>
{% endif %}
{% if summary.smaller_adapter %}
<p class="soft">At rank {{ summary.smaller_adapter.rank }} at most (<code>{{ summary.smaller_adapter.folder }}</code>):
perplexity {{ summary.smaller_adapter.perplexity | number(3) }}</p>
{% endif %}
{% if texts %}
<h2>What it writes</h2>
<div class="wide"><table class="texts">
<tr><th>held-out prompt</th><th class="text">before</th><th class="text">after</th>
<th class="text">the row's own</th></tr>
{% for text in texts %}
<tr><td>{{ text.prompt | truncate(400) }}</td>
<td class="text">{{ text.before | default("-") | trim | truncate(400) }}</td>
<td class="text">{{ text.after | default("-") | trim | truncate(400) }}</td>
<td class="text">{{ text.reference | truncate(400) }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

{% if clients %}
<h2>Who held what</h2>
<div class="wide"><table>
<tr><th>client</th><th>examples</th><th>blocks</th><th>mean rank</th><th>checkpointing</th><th>budget</th>
<th>planned</th><th>measured peak</th><th>tokens/s</th><th>rounds</th><th>last loss</th></tr>
{% for client in clients %}
<tr><td>{{ client.client }}</td><td>{{ client.examples }}</td>
{% if client.left_out %}
<td class="text" colspan="3">left out: {{ client.left_out }}</td>
{% else %}
<td class="words">{{ client.split if client.split is defined else "-" }}
{%- if client.blocks %} of {{ client.blocks }}{% endif %}
{{- ", forward alone" if client.trains is false }}</td>
<td>{{ client.mean_rank | number(1) }}</td><td>{{ client.checkpointing or "-" }}</td>
{% endif %}
<td>{{ client.budget_bytes | gb }}</td><td>{{ client.predicted_bytes | gb }}</td>
<td>{{ client.measured_bytes | gb }}
{{- " beside %s in the machine" | format(client.beside_bytes | gb) if client.beside_bytes }}</td>
<td>{{ client.tokens_per_second | number(0) }}</td>
<td>{{ client.trained }}</td><td>{{ client.loss | number(3) }}</td></tr>
{% endfor %}
</table></div>
{% if more_clients %}<p class="soft">and {{ more_clients }} more, in summary.json</p>{% endif %}
{{ memory }}
<p class="soft">The peak is the highest of all rounds; plan and peak are of the whole process, or of its
tensors on a GPU.</p>
{% endif %}

{% if maps or importance %}
<h2>Where ranks went</h2>
<p class="soft">A column for every block, a row for every kind of weight; the stronger the colour, the more; a gap has
no adapter. Left of the line is the client, right of it the server.</p>
{% if highest %}
<p class="legend">rank 0 {% for colour, shade in shades %}<i style="background:{{ colour }};opacity:{{ shade }}"></i>
{%- endfor %} {{ highest }}, the highest; in each picture the strongest colour is its own highest</p>
{% endif %}
{% for name, map in maps %}
<h3>{{ name }}</h3>
<div class="wide">{{ map }}</div>
{% endfor %}
{% if more_maps %}<p class="soft">and {{ more_maps }} more clients, in summary.json</p>{% endif %}
{% if importance %}
<h3>importance, per unit of cost</h3>
<div class="wide">{{ importance }}</div>
{% endif %}
{% endif %}

{% if rounds %}
<h2>What it took</h2>
{{ losses }}
{% if times %}
<h3>Seconds of all rounds, by client</h3>
{{ times }}
<p class="soft">Steps are those of both sides, with what travels between them and the wait for a turn.
{% if measuring %}The server measured the held-out text for {{ measuring | number(1) }} s.{% endif %}</p>
{% endif %}
{% if traffic %}
<h3>Sent in all rounds, by client</h3>
{{ traffic }}
{% endif %}
<h3>Rounds</h3>
<div class="wide"><table>
<tr><th>round</th><th>perplexity</th><th>update norm</th><th>clients</th><th>time</th><th>up</th><th>down</th>
<th>server</th><th>plan</th></tr>
{% for row in rounds %}
<tr><td>{{ row.round }}</td><td>{{ row.perplexity | default(none) | number(3) }}</td>
<td>{{ row.update_norm | number }}</td>
<td>{{ row.clients }}{% if row.clients < row.known_clients | default(0) %} of {{ row.known_clients }}{% endif %}</td>
<td>{{ row.seconds | number(1) }} s</td><td>{{ row.bytes_up | mb }}</td>
<td>{{ row.bytes_down | mb }}</td><td>{{ row.server_measured_bytes | gb }}</td>
<td class="text">{{ row.planned }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

{% if failures %}
<h3>Clients that failed</h3>
<div class="wide"><table>
<tr><th>round</th><th>client</th><th class="text">why</th></tr>
{% for failure in failures %}
<tr><td>{{ failure.round }}</td><td>{{ failure.client }}</td><td class="text">{{ failure.error }}</td></tr>
{% endfor %}
</table></div>
{% if more_failures %}<p class="soft">and {{ more_failures }} more, in summary.json</p>{% endif %}
{% endif %}

<h2>Made with</h2>
<p class="soft">
{% for name, version in summary.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}
</p>
<details><summary>settings</summary>
<table>
{% for key, value in config.items() %}
<tr><td><code>{{ key }}</code></td><td class="text"><code>{{ value }}</code></td></tr>
{% endfor %}
</table>
</details>
""",
)
