"""The card of an adapter: ``README.md``, as the hub shows it; and what stands beside it.

base        which model it changes, by a name that others can find where there is one
method      how it came to be
data        in words: how many rows of what kind, and who held them; no paths, which may be private
metrics     what was measured on text that nobody trained on
how to load
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hsplitlora_flwr.data.files import is_hub_name
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.demo import DEMO_ORIGIN, is_demo_model
from hsplitlora_flwr.schema import ConfigError

CARD_FILE = "README.md"
_SOURCES = {
    "dialogues": "English dialogues of the package chatterbot-corpus",
    "chitchat": "chats of the package chitchat-dataset",
    "e2e": "the E2E NLG challenge",
}
_KINDS = {
    "chat": "chats, of which the assistant's turns are learnt",
    "alpaca": "instructions with their answers, in Alpaca's words",
    "line": "prompts, each on lines of its own, with completions",
    "pair": "prompts with completions",
    "text": "plain texts",
}
_DEALT = {
    "iid": "evenly",
    "linear": "in amounts that grow from client to client",
    "dirichlet": "by a Dirichlet distribution over their groups",
    "natural": "in whole groups",
}


def write_card(summary: Mapping[str, Any], folder: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write the card of an adapter, or of a merged model, into its folder.

    Parameters
    ----------
    summary : Mapping
        The content of ``summary.json``, of a run that has an adapter.
    folder : Path
        The adapter's.
    facts : Mapping[str, str], optional
        What is true of this adapter and not of the run's: a row of the metrics by name.
    """
    card(summary, facts or {}, merged=(folder / "config.json").exists()).save(folder / CARD_FILE)


def card(summary: Mapping[str, Any], facts: Mapping[str, str], *, merged: bool = False) -> ModelCard:
    """The card; see :func:`write_card`."""
    config, base = summary["config"], base_on_hub(summary["config"]["model.path"])
    data, told = config["data.source"], perplexity_of(summary)
    named = config["data.path"] if data in ("own", "jsonl") and is_hub_name(config["data.path"]) else ""
    made = ModelCardData(
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=base or None,
        datasets=[named] if named else None,
        tags=["lora", "federated-learning", "split-learning", "flower", config["method.name"]],
        model_name=f"{config['method.name']} of {base or 'a model'} on {data}",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=named or data,
                dataset_name=f"{named or data}, held-out rows",
                metric_type="perplexity",
                metric_value=round(told[1], 4),
            )
        ]
        if told
        else None,
    )
    return ModelCard(f"---\n{made.to_yaml()}\n---\n\n{_text(summary, facts, base, merged)}")


def shrunk_facts(rank: int, perplexity: float | None, dropped: float) -> dict[str, str]:
    """What the card of an adapter at a rank says beside the run's own figures."""
    measured = {} if perplexity is None else {f"perplexity at rank {rank} at most": f"{perplexity:.3f}"}
    return measured | {"left out, of the update's squared norm": f"{dropped:.3%}"}


def base_on_hub(path: str) -> str:
    """The name by which others find the base of a run; "" for a folder."""
    if is_demo_model(path):
        return DEMO_ORIGIN
    return path if not Path(path).expanduser().exists() and (is_hub_name(path) or "/" not in path) else ""


def perplexity_of(summary: Mapping[str, Any]) -> tuple[float, float] | None:
    """Before and after; None if either was not measured."""
    before, after = summary.get("perplexity_before"), summary.get("perplexity_after")
    return None if before is None or after is None else (before, after)


def _text(summary: Mapping[str, Any], facts: Mapping[str, str], base: str, merged: bool) -> str:
    config = summary["config"]
    what = "model" if merged else "LoRA adapter"
    name = base or f"`{Path(config['model.path']).name}`"
    rows = "\n".join(f"| {name} | {value} |" for name, value in {**_metrics(summary), **facts}.items())
    return f"""# A {what} made with HSplitLoRA

{_base(config["model.path"], base, what)}

## Method

{_method(summary)}

## Data

{_data(summary)}

## Metrics

| | |
| --- | --- |
{rows}

Perplexity is that of {summary.get("held_out_tokens", 0):,} tokens of held-out rows, which nobody trained on.

## How to load

```python
{_MERGED if merged else _ADAPTER}
```

{"" if merged else f"`manifest.json` has rank, shape, norm and SHA-256 of every layer. The base is {name}."}
Made with {", ".join(f"{name} {version}" for name, version in summary["versions"].items())}.
"""


_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

adapter = "."  # this folder, or its name on the hub
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)"""
_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(".")"""


def _base(path: str, base: str, what: str) -> str:
    if is_demo_model(path):
        return (
            f"The {what} changes [{base}](https://huggingface.co/{base}), whose weights were read from a 4-bit file "
            "and converted to float32: over the original weights it computes a little differently."
        )
    if base:
        return f"The {what} changes [{base}](https://huggingface.co/{base})."
    return f"The {what} changes a model in the folder `{Path(path).name}` of the machine that it was trained on."


def _method(summary: Mapping[str, Any]) -> str:
    config, rounds = summary["config"], summary["rounds"]
    method = METHODS.get(config["method.name"])
    clients = sorted({row["client"] for each in rounds for row in each["clients"]})
    said = method.summary or method.source if method else ""
    steps = f"{len(rounds)} rounds of {config['train.steps']} steps of {config['train.batch_size']} rows"
    where = "in one place" if method and method.central else f"by {len(clients)} clients"
    return (
        f"`{config['method.name']}`{f': {said}' if said else ''}. {steps}, {where}; {config['train.optimizer']} at "
        f"{config['train.lr']:g}, ranks from {config['lora.ranks']}. The text of a client stays with it."
    )


def _data(summary: Mapping[str, Any]) -> str:
    config, text = summary["config"], summary.get("text", {})
    source = config["data.source"]
    own = f"the data set {config['data.path']}" if is_hub_name(config["data.path"]) else "data of one's own"
    said = _SOURCES.get(source, own if source in ("own", "jsonl") else f"the source `{source}`")
    sentences = [f"{said[0].upper()}{said[1:]}"]
    if text:
        train, held = text["training"], text["held_out"]
        kind = _KINDS.get(held.get("prompts", ""), "")
        sentences[0] += f": {train['rows']:,} rows, {train['tokens']:,} tokens{f', {kind}' if kind else ''}"
        sentences += [f"{held['rows']:,} rows were held out"]
        if train["cut_rows"]:
            sentences += [f"{train['cut_rows']:,} rows were cut to {config['data.max_length']} tokens"]
    if not config["data.path"] and source in ("own", "jsonl"):
        sentences += ["Every client had text of its own"]
    elif config["data.partition"] in _DEALT:
        sentences += [f"Rows were dealt to clients {_DEALT[config['data.partition']]}"]
    return ". ".join(sentences) + "."


def _metrics(summary: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    if told := perplexity_of(summary):
        found |= {"perplexity of the base": f"{told[0]:.3f}", "perplexity": f"{told[1]:.3f}"}
    best = summary.get("best") or {}
    if best.get("round") and best["round"] != len(summary["rounds"]):
        found["perplexity of the best round"] = f"{best['perplexity']:.3f}, after round {best['round']}"
    scores = summary.get("generation", {})
    return found | {name: f"{score:.4f}" for name, score in scores.items() if score is not None}


def check_card(folder: Path) -> None:
    """See that what is to be pushed has a card.

    Raises
    ------
    ConfigError
        If it has none.
    """
    if not (folder / CARD_FILE).is_file():
        raise ConfigError(f"{folder} has no {CARD_FILE}; it was not written by this version")
