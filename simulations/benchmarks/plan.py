"""``plan``: time to plan for a large federation."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial

from transformers import LlamaConfig

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.planning import Budget, CostModel
from hsplitlora_flwr.planning.round import cost_model, make_round_plan
from simulations.benchmarks.common import Row, Setup, take_turns, timed

MODEL = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)
"""70.6 billion parameters."""
CASES = tuple(itertools.product(("not stated", "scarce"), ("exact", "greedy")))
CLIENTS = {1000: CASES, 10_000: CASES[:1]}
"""How many there are, for which memory of the server, and what plans for them."""
MEMORY_GB = (24, 40, 80)
PROCESS_BYTES = 500_000_000
"""What a process takes for itself."""
SERVER_SHARE = 0.9
"""The server's memory where it is scarce, over what the plan without that limit takes."""
TURNS = 3


def plan(setup: Setup) -> Iterator[Row]:
    """Time to plan a round for clients of a model with 70 billion parameters in bf16; goals: less than 10 s for 1,000
    clients, and less than 5 s for 10,000.

    The clients have 24, 40 and 80 GB in turn, which are few classes to the planner, or budgets between 24 and 80 GB
    that are all different. Importance is uniform. Rows are the exact planner and the greedy one of the paper, each
    without a limit to the server's memory and with 0.9 times what the exact plan then takes of it, so that the clients'
    choices hang together. For 10,000, whose frames alone fill a server, there is the exact one without a limit.

    ``cost_model_s`` is what reading the model's configuration takes before; ``plan_s`` is a median over turns, and
    ``spread_s`` the distance between their quartiles; ``cpu_s`` is the CPU time of one more, which other work on the
    machine moves less. No plan has a higher ``objective / bound`` than 1, whichever
    planner made it.
    """
    with tempfile.TemporaryDirectory() as folder:
        MODEL.save_pretrained(folder)
        for count in CLIENTS:
            yield from _plans(folder, count)


def _plans(folder: str, count: int) -> Iterator[Row]:
    """Rows of so many clients."""
    config = Config.from_run_config({"model.path": folder, "model.dtype": "bfloat16", "clients.count": count})
    costs: list[CostModel] = []
    rows = config.train.batch_size
    [reading] = take_turns(
        [partial(timed, lambda: costs.append(cost_model(config, rows, config.data.max_length)))], TURNS
    )
    for sizes, memory in SIZES.items():
        budgets = {str(index): Budget(memory(index, count), PROCESS_BYTES) for index in range(count)}
        scarce, bound = 0, 0.0
        for server_gb, planner in CLIENTS[count]:
            chosen = Config.from_run_config({**config.to_run_config(), "plan.planner": planner})
            server = Budget(sys.maxsize if server_gb == "not stated" else scarce, PROCESS_BYTES)
            make = partial(make_round_plan, chosen, budgets, server, {}, costs[-1])
            before = time.process_time()
            made = make()
            cpu = time.process_time() - before
            [seconds] = take_turns([partial(timed, make)], TURNS, warm_up=0)
            if planner == "exact":
                scarce, bound = scarce or int(SERVER_SHARE * made.server_bytes), made.bound
            yield {
                "clients": count,
                "budgets": sizes,
                "server": server_gb,
                "planner": planner,
                "cost_model_s": reading.median,
                "plan_s": seconds.median,
                "spread_s": seconds.spread,
                "cpu_s": cpu,
                "server_gb": made.server_bytes / 1e9,
                "left out": len(made.left_out),
                "objective": made.objective,
                "objective / bound": made.objective / bound,
            }


def of_three_sizes(client: int, count: int) -> int:
    """Bytes of memory: 24, 40 and 80 GB in turn."""
    return MEMORY_GB[client % len(MEMORY_GB)] * 10**9


def all_different(client: int, count: int) -> int:
    """Bytes of memory, no two clients alike, spread evenly from 24 GB up to 80 GB."""
    low, *_, high = MEMORY_GB
    return low * 10**9 + client * (high - low) * 10**9 // count


SIZES = {"3 sizes": of_three_sizes, "all different": all_different}
