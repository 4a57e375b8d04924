"""Checks of text, model, split, adapters and budgets before anything is loaded."""

from __future__ import annotations

import math

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.fit import check_positions, fit_text
from hsplitlora_flwr.data.partition import cached_partition
from hsplitlora_flwr.data.sources import DataError, TextData
from hsplitlora_flwr.evaluation.scores import check_installed
from hsplitlora_flwr.lora.aggregation import RULES
from hsplitlora_flwr.methods import METHODS
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.loading import check_model
from hsplitlora_flwr.models.quantisation import check_quantiser
from hsplitlora_flwr.planning.budget import PlanError
from hsplitlora_flwr.planning.round import cost_model, split_bounds
from hsplitlora_flwr.reporting.trackers import check_trackers
from hsplitlora_flwr.schema import scalar


def check_text(config: Config, text: TextData) -> None:
    """See that the text fits the model, and what is to be measured on it.

    Raises
    ------
    DataError
        As of :func:`hsplitlora_flwr.data.fit.fit_text`, or if texts are to be generated and there is nothing to start
        them from.
    ModuleNotFoundError
        If the packages that score them are not installed.
    """
    fit_text([*text.train, *text.held_out], config)
    if not config.evaluation.generate:
        return
    check_installed()
    if not all(example.prompt for example in text.held_out):
        raise DataError(
            "evaluation.generate=true writes a text for every held-out prompt, and some held-out rows have none; "
            "use rows of {prompt, completion}, or evaluation.generate=false"
        )


def check_model_settings(config: Config) -> None:
    """See that the settings of a run fit its model, from the model's configuration alone.

    Raises
    ------
    ValueError
        ``ConfigError``, ``ModelFilesError``, ``SplitError``, ``UnsupportedModelError`` or ``PlanError``, each with the
        value that is wrong and what to do.
    ModuleNotFoundError
        If what quantises the base, or a tracker, is not installed.
    """
    check_quantiser(config.model.quantise)
    check_trackers(config.run.trackers)
    check_model(config.model.path, config.split.min, config.split.max)
    check_positions(config)
    cost, method = cost_model(config, rows=1, length=2), METHODS[config.method.name]
    if config.lora.init == "update" and (method.keeps_global_adapter or method.central):
        raise ConfigError(
            "lora.init=update is for adapters that start anew in every round; those of "
            f"method.name={config.method.name} are carried on. Set it to auto"
        )
    if method.rule not in RULES:
        raise ConfigError(
            f"method.name={config.method.name} adds adapters up by the rule {method.rule!r}, which is not registered; "
            f"there are {', '.join(RULES)}"
        )
    if config.lora.clients == "none" and not method.split:
        raise ConfigError(
            f"lora.clients=none leaves training to the server's half, and method.name={config.method.name} has none; "
            "set it to plan"
        )
    _check_generation(config)
    if method.central:
        return
    clients = config.clients
    if config.plan.deadline and clients.memory_bytes and not (clients.gflops or config.plan.server_gflops):
        raise ConfigError(
            f"plan.deadline={config.plan.deadline:g} needs speeds, and a client whose memory is stated measures none; "
            "state clients.gflops, clients.mbit_up and clients.mbit_down, or set plan.deadline=0"
        )
    # What the process itself takes is measured later, on the clients; the weights alone may already be too much.
    least, _ = split_bounds(config, cost.num_blocks)
    needed, what = cost.client_bytes(least, {}), f"the embeddings and {least} block(s)"
    if not method.split:
        needed, what = (0 if config.plan.over_budget else cost.whole_bytes({})), "all"
    missing = needed - max(clients.memory_bytes, default=0)
    where = "clients.gpu_memory_gb" if clients.gpu_memory_gb else "clients.memory_gb"
    if clients.memory_bytes and missing > 0:
        raise PlanError(
            f"{where}={scalar(clients.gpu_memory_gb or clients.memory_gb)}: even the largest budget misses "
            f"{missing:,} bytes for {what} of {config.model.path}; raise it or choose a smaller model"
            + ("" if method.split else f", or set plan.over_budget: method.name={config.method.name} does not split")
        )


def check_parts(config: Config, text: TextData) -> None:
    """See that the training text can be dealt to ``clients.count`` clients, and leaves each something to train on.

    Raises
    ------
    DataError, ConfigError
        If it cannot, or does not.
    """
    if METHODS[config.method.name].central or not text.train:
        return
    parts = cached_partition(text.train, config.data, config.clients.count, config.run.seed)
    fewest, apart = min(map(len, parts)), config.evaluation.client_rows
    if apart >= fewest:
        raise ConfigError(
            f"evaluation.client_rows={apart} keeps all of a client's {fewest} rows out of training; lower it, or use "
            "more rows or fewer clients"
        )


def _check_generation(config: Config) -> None:
    positions = getattr(read_config(config.model.path).get_text_config(), "max_position_embeddings", math.inf)
    longest = config.evaluation.max_new_tokens
    if config.evaluation.generate and longest >= positions:
        raise ConfigError(
            f"evaluation.max_new_tokens={longest} leaves no room for a prompt in the {positions} positions of "
            f"{config.model.path}; lower it"
        )
