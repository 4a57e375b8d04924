"""What can be wrong with the model, the split, the adapters and the budgets, known before anything is loaded."""

from __future__ import annotations

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.models.loading import check_model, read_config
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.planning.cost import CostModel, PlanError, Workload


def check_model_settings(config: Config) -> None:
    """See that the settings of a run fit its model, from the model's configuration alone.

    Raises
    ------
    ValueError
        ``ModelFilesError``, ``SplitError``, ``UnsupportedModelError`` or ``PlanError``, each with the value that is
        wrong and what to do.
    """
    check_model(config.model.path, config.split.min, config.split.max)
    model = read_config(config.model.path)
    cost = CostModel(model, find_family(model), Workload(1, 2, config.model.dtype), config.targets)
    # What the process itself takes is measured later, on the clients; the weights alone may already be too much.
    missing = cost.client_bytes(config.split.min, {}) - max(config.memory_bytes, default=0)
    if config.memory_bytes and missing > 0:
        raise PlanError(
            f"clients.memory_gb={config.clients.memory_gb}: even the largest budget misses {missing:,} bytes for the "
            f"embeddings and {config.split.min} block(s) of {config.model.path}; raise it or choose a smaller model"
        )
