"""Which client trains on which rows.

The rules are those of flwr-datasets, on a table of row numbers and groups: ``iid`` deals evenly, ``linear`` gives
client k a share that grows with k + 1, ``dirichlet`` draws each group's shares (https://arxiv.org/abs/1905.12022), and
``natural`` keeps every group whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from hsplitlora_flwr.config import DataConfig
from hsplitlora_flwr.data.sources import DataError, Example


def cached_partition(
    examples: Sequence[Example], config: DataConfig, num_clients: int, seed: int, folder: Path | None = None
) -> list[list[int]]:
    """As :func:`partition`, from a file of ``folder`` where the same was asked for before.

    A node of a deployment is a new process for every message, and what deals rows takes seconds to import.

    Parameters
    ----------
    folder : Path, optional
        By default ``partitions`` in the user's cache directory.
    """
    asked = [config.partition, config.alpha, num_clients, seed, [example.group for example in examples]]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    file = (folder or platformdirs.user_cache_path("hsplitlora_flwr") / "partitions") / f"{digest}.json"
    try:
        parts: list[list[int]] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        parts = partition(examples, config, num_clients, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        draft.write_text(json.dumps(parts), encoding="utf-8")
        draft.replace(file)
    return parts


def partition(examples: Sequence[Example], config: DataConfig, num_clients: int, seed: int) -> list[list[int]]:
    """The row numbers of every client, by the rule ``config.partition``.

    Every row goes to exactly one client and no client is empty. ``iid`` and ``linear`` shuffle the rows by ``seed``
    first and ``dirichlet`` draws by it; ``natural`` deals groups in turn, by name, and draws nothing. So clients differ
    in what they hold and in how much.

    Raises
    ------
    DataError
        If there are fewer rows than clients, ``natural`` has fewer groups than clients, or the shares that
        ``linear`` or ``dirichlet`` give leave a client without rows.
    """
    if not 1 <= num_clients <= len(examples):
        raise DataError(f"{len(examples)} training rows cannot be dealt to {num_clients} clients; each needs a row")
    # Imported here: it takes seconds, and only a node that deals rows needs it.
    import datasets
    from flwr_datasets import partitioner as rules

    rows = list(range(len(examples)))
    group_of_row = [0] * len(rows)
    rule: rules.Partitioner
    if config.partition == "natural":
        group_of_row = _deal_groups([example.group for example in examples], num_clients)
        # Groups of one: the same result as NaturalIdPartitioner, which draws a progress bar on the terminal.
        rule = rules.GroupedNaturalIdPartitioner("group", group_size=1, sort_unique_ids=True)
    elif config.partition == "dirichlet":
        # Numbers for names: numpy, inside the rule, takes "a" and "a\0" for one string and would deal rows twice.
        number = {group: index for index, group in enumerate(sorted({example.group for example in examples}))}
        group_of_row = [number[example.group] for example in examples]
        rule = rules.DirichletPartitioner(num_clients, "group", config.alpha, min_partition_size=1, seed=seed)
    else:
        random.Random(seed).shuffle(rows)
        rule = {"iid": rules.IidPartitioner, "linear": rules.LinearPartitioner}[config.partition](num_clients)
    rule.dataset = datasets.Dataset.from_dict({"row": rows, "group": group_of_row})
    try:
        with warnings.catch_warnings():
            # Dirichlet warns at every draw that it repeats because a client got nothing; only the last one matters.
            warnings.simplefilter("ignore")
            return [list(rule.load_partition(client)["row"]) for client in range(num_clients)]
    except ValueError:
        raise DataError(
            f"data.partition={config.partition} leaves one of {num_clients} clients without any of the "
            f"{len(examples)} rows; use fewer clients, more rows"
            + (f" or a data.alpha above {config.alpha:g}" if config.partition == "dirichlet" else "")
        ) from None


def _deal_groups(groups: Sequence[str], num_clients: int) -> list[int]:
    """The client of every row, so that rows of a group stay together and no client is empty."""
    sizes = set(groups)
    if len(sizes) < num_clients:
        raise DataError(
            f"data.partition=natural keeps groups whole, and {len(sizes)} groups cannot serve {num_clients} clients; "
            "use fewer clients or data.partition=dirichlet"
        )
    client_of_group = {group: index % num_clients for index, group in enumerate(sorted(sizes))}
    return [client_of_group[group] for group in groups]
