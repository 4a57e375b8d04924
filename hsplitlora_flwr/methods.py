"""HSplitLoRA, its ablations and what it is compared with: which plan, which aggregation, split or not.

All of them share data, seeds, batches, schedule, optimizer, training step and evaluation. What is not the same stands
in :data:`METHODS`, to which :func:`register_method` adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.config.names import KNOWN_METHODS
from hsplitlora_flwr.registry import Registry


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Parameters
    ----------
    source : str
        Where it comes from.
    summary : str
        What it does, in a line, for whoever chooses one.
    split : bool
        The model is cut, and the server trains its part. Else a client holds all of it.
    half : {"", "shared", "per_client"}
        Whose adapters a client's steps train on the server, whatever ``server.half`` says; "" leaves it to that.
    central : bool
        All data lie in one place and are trained on there.
    ranks : str
        ``plan``: splits and ranks by importance and budgets (ARMSC). ``budget``: per client the highest one rank for
        all its weights that its memory holds. ``equal``: ``lora.rank`` and one split for everybody.
    importance : bool
        Whether weights are scored (IWI); without it all count the same.
    rule : str
        How adapters are added up: a name in :data:`hsplitlora_flwr.lora.aggregation.RULES`.
    keeps_global_adapter : bool
        There is one global adapter, which every round goes on from, cut to each client's rank. Else the update of a
        round goes into the weights and adapters start afresh.
    residual : bool
        Of a global adapter: what the exact sum of the clients has and the adapter lacks goes into the weights.
    init : str
        Where ``A`` starts in a round unless ``lora.init`` says otherwise: ``kaiming``, or from the second round on
        along the last round's ``update``. Without meaning where an adapter is carried on.
    freeze_a : bool
        ``A`` stays as it started; only ``B`` trains.
    full : bool
        All weights train, without adapters.
    targets : tuple of str, optional
        Layers that get adapters unless ``lora.targets`` says otherwise; all when None.

    Raises
    ------
    ValueError
        If ``half``, ``ranks`` or ``init`` is none of these, or ``residual`` has no global adapter of a whole model.
    """

    source: str = ""
    summary: str = ""
    split: bool = True
    half: str = ""
    central: bool = False
    ranks: Literal["plan", "budget", "equal"] = "plan"
    importance: bool = True
    rule: str = "noise_free"
    keeps_global_adapter: bool = False
    residual: bool = False
    init: Literal["kaiming", "update"] = "kaiming"
    freeze_a: bool = False
    full: bool = False
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} of a method; choose one of {allowed}")
        if self.residual and (self.split or not self.keeps_global_adapter):
            raise ValueError(
                "residual of a method is for one global adapter over a whole model: keeps_global_adapter and no split"
            )


_ALLOWED = {"half": ("", "shared", "per_client"), "ranks": ("plan", "budget", "equal"), "init": ("kaiming", "update")}

METHODS: Registry[Method] = KNOWN_METHODS
"""Methods by name."""


def register_method(name: str, method: Method) -> Method:
    """Make a method known as ``method.name=<name>``; returns it.

    Parameters
    ----------
    name : str
        What settings call it.
    method : Method
        How it differs from the others; ``dataclasses.replace(METHODS["hsplitlora"], ...)`` says so in a line.

    Raises
    ------
    PluginError
        If the name is taken.
    """
    return METHODS.register(name, method)


_WHOLE = Method(split=False, importance=False)
_HSPLITLORA = Method(
    source="arXiv 2505.02795",
    summary="splits and ranks by importance and budget, noise-free aggregation",
    init="update",
)
QUERY_AND_VALUE = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv")
"""Query and value projections by the names that families give them; some keep query, key and value in one layer."""

_SPLITLORA = replace(
    _HSPLITLORA,
    summary="one split and one rank for all, query and value only; mean of A and mean of B",
    source="arXiv 2407.00952",
    half="shared",
    ranks="equal",
    importance=False,
    rule="mean",
    keeps_global_adapter=True,
    targets=QUERY_AND_VALUE,
)
_FEDIT = replace(
    _WHOLE,
    summary="no split, one rank; mean of A and mean of B",
    source="arXiv 2305.05644",
    ranks="equal",
    rule="mean",
    keeps_global_adapter=True,
)

_OURS: dict[str, Method] = {
    "hsplitlora": _HSPLITLORA,
    "splitlora": _SPLITLORA,
    "splitlora-v1": replace(
        _SPLITLORA,
        summary="the same, with a server half for each client, and the mean of them all",
        source="arXiv 2407.00952, version 1",
        half="per_client",
    ),
    "fedit": _FEDIT,
    "fedex": replace(
        _FEDIT,
        summary="the same; what the product of the means lacks of the exact sum goes into the weights",
        source="arXiv 2410.09432",
        residual=True,
    ),
    "hetlora": replace(
        _WHOLE,
        summary="no split, ranks by budget; zero padding, weights by the norm of B A",
        source="arXiv 2401.06432",
        ranks="budget",
        rule="zero_pad_by_norm",
        keeps_global_adapter=True,
    ),
    "flexlora": replace(
        _WHOLE,
        summary="no split, ranks by budget; dense sum, cut to each client's rank by SVD",
        source="arXiv 2402.11505",
        ranks="budget",
        rule="svd",
        keeps_global_adapter=True,
    ),
    "flora": replace(_WHOLE, summary="no split, ranks by budget; stacking", source="arXiv 2409.05976", ranks="budget"),
    "ffa": replace(
        _WHOLE,
        summary="no split, one rank, A frozen at a shared start; mean of B",
        source="arXiv 2403.12313",
        ranks="equal",
        rule="mean_b",
        keeps_global_adapter=True,
        freeze_a=True,
    ),
    "cenlora": replace(
        _WHOLE, summary="LoRA with all data in one place", source="LoRA, arXiv 2106.09685", central=True, ranks="equal"
    ),
    "full": replace(
        _WHOLE,
        summary="full fine-tuning with all data in one place; it leaves a model instead of an adapter",
        source="full fine-tuning",
        central=True,
        ranks="equal",
        full=True,
    ),
    "hsplitlora-no-iwi": replace(
        _HSPLITLORA,
        summary="hsplitlora without importance: all weights count the same",
        source="ablation: uniform importance",
        importance=False,
    ),
    "hsplitlora-no-armsc": replace(
        _HSPLITLORA,
        summary="hsplitlora without adaptive ranks and split points: one split, one rank",
        source="ablation: one split, one rank",
        ranks="equal",
        importance=False,
    ),
    "hsplitlora-no-naa": replace(
        _HSPLITLORA,
        summary="hsplitlora without noise-free aggregation: zero padding",
        source="ablation: zero padding",
        rule="zero_pad",
    ),
}
for _name, _method in _OURS.items():
    register_method(_name, _method)


def starts_along_update(config: Config) -> bool:
    """Whether ``A`` starts along the last round's update."""
    chosen = METHODS[config.method.name].init if config.lora.init == "auto" else config.lora.init
    return chosen == "update"


def shares_half(config: Config) -> bool:
    """Whether one half of the server serves all clients of a round; each has one of its own else."""
    method = METHODS[config.method.name]
    return method.split and (method.half or config.server.half) == "shared"


def with_room_for_messages(config: Config, at_once: int) -> Config:
    """The settings where ``at_once`` clients can be at work: with fewer than a round has, no message lasts longer than
    its task."""
    lasts = METHODS[config.method.name].split and config.transport.kind != "messages"
    if not lasts or config.clients.drawn_of(config.clients.count) <= at_once:
        return config
    return replace(config, train=replace(config.train, rounds_per_message=1))


def keeps_half(config: Config) -> bool:
    """Whether the shared half goes on into the next round, adapters and optimizer."""
    return shares_half(config) and config.server.between_rounds == "keep"
