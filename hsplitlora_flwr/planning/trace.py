"""How much memory one step of a block and of the head takes, traced on tensors without values.

A forward and a backward pass run on fake tensors: those take the same path through the code as real tensors on a CPU,
fused attention included, and have sizes and lifetimes but no memory. So a block of a 70B model costs no more to trace
than one of a small model.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig
from transformers.integrations.moe import ExpertsInterface

from hsplitlora_flwr.lora.layers import AdapterSpec, inject, shape_of, takes_changes
from hsplitlora_flwr.models.families import Architecture, Family, shorten
from hsplitlora_flwr.models.parts import ClientModel, HeadModel
from hsplitlora_flwr.models.proof import brief
from hsplitlora_flwr.models.split import head_part, one_block, outline
from hsplitlora_flwr.models.stored import empty_model
from hsplitlora_flwr.planning.budget import PlanError

EXPERTS = "hsplitlora-traced"
"""The implementation of a mixture's experts in traced models. Fake tensors have no values that would say which tokens
each expert gets, and grouped products support few dtypes there; sizes here are those of the grouped products."""


@dataclass(frozen=True)
class LayerTrace:
    """A linear layer of a block: its sizes, and what an adapter on it makes autograd keep."""

    in_features: int
    out_features: int
    input_id: int
    """Layers with the same number read the same tensor; it is kept once."""
    input_bytes: int
    """Bytes of that tensor if a block without adapters would not keep it; else 0."""


@dataclass(frozen=True)
class BlockTrace:
    """Bytes of one block in a step, for one micro-batch; see :func:`trace_block`."""

    kept: int
    """What a block without adapters keeps for backward, without masks and rotary tables, which all blocks share."""
    peak: int
    """The most that is alive at one time in a step of one block with adapters on all layers, without its parameters and
    their gradients."""
    forward: int
    """The same in a forward pass without adapters, which keeps nothing."""
    layers: dict[str, LayerTrace]
    """By name inside the block."""
    parameters: int


@dataclass(frozen=True)
class ModelTrace:
    """The traces of a model; see :func:`trace_model`."""

    kinds: list[int]
    """For every block, the index of the first block of its kind."""
    blocks: dict[int, BlockTrace]
    """By the index of the kind."""
    head: int
    """Bytes of a step of norm, head and loss; see :func:`trace_head`."""
    beside_blocks: int
    """Parameters outside the blocks: embeddings, final norm and head."""
    embeddings: int
    """Those of the embeddings, which the client holds."""


def trace_model(config: PretrainedConfig, family: Family, dtype: str, rows: int, length: int, rank: int) -> ModelTrace:
    """Trace each kind of block of a model, and its head. Results are cached.

    Parameters
    ----------
    config : PretrainedConfig
        The model's configuration; it is not changed.
    family : Family
        Its layout.
    dtype : str
        Of the frozen base.
    rows, length, rank : int
        As for :func:`trace_block`.

    Raises
    ------
    PlanError
        If its blocks cannot be traced.
    """
    return _trace_model(Architecture.of(config), family, dtype, rows, length, rank)


@lru_cache(maxsize=64)
def _trace_model(
    architecture: Architecture, family: Family, dtype: str, rows: int, length: int, rank: int
) -> ModelTrace:
    config = copy.deepcopy(architecture.config)
    count = int(config.num_hidden_layers)
    if family.alike:  # then two will do, the fewest that can be cut
        shorten(config, 0, 2)
    model = empty_model(config, dtype, experts=EXPERTS)
    decoder = model.get_submodule(family.decoder)
    blocks = list(decoder.get_submodule(family.blocks).children())
    outlines = [outline(block) for block in blocks]
    kinds = [0] * count if family.alike else [outlines.index(each) for each in outlines]
    beside_blocks = _numel(model) - sum(map(_numel, blocks))
    embeddings = sum(_numel(getattr(decoder, name, None)) for name in family.embeddings)
    try:
        traces = {
            kind: trace_block(one_block(model, family, kind), rows, length, rank) for kind in dict.fromkeys(kinds)
        }
    except Exception as error:  # whatever the code of a model does with tensors that hold no values
        raise PlanError(
            f"what a '{model.config.model_type}' keeps in memory cannot be predicted: its blocks cannot be traced "
            f"without values ({brief(error)}); choose another model, or a newer release of transformers if there is one"
        ) from error
    head = trace_head(head_part(model, family), rows, length)
    return ModelTrace(kinds, traces, head, beside_blocks, embeddings)


def trace_block(client: ClientModel, rows: int, length: int, rank: int) -> BlockTrace:
    """Trace the first block of a part.

    Parameters
    ----------
    client : ClientModel
        A client with one block, whose weights need no memory; it must not be used afterwards.
    rows, length : int
        Batch size and sequence length. Rows count as padded, as those of a batch mostly are: attention with a mask may
        keep more than without.
    rank : int
        Rank of the adapters in the step whose peak is measured.
    """
    parameters = _numel(client.blocks[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        client.to_empty(device="cpu").train()
        client.decoder.training = False  # its blocks train; older releases throw dice over each of them where it does
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, length, dtype=torch.long)

        def forward() -> Tensor:
            cut: Tensor = client.decoder(
                input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False
            ).last_hidden_state
            return cut

        with torch.no_grad(), LiveBytes(client.parameters()) as alone:
            forward()
        kept, layers = _keep(client, forward)
        adapters = inject(client, {name: AdapterSpec(rank, 1.0) for name, _ in client.linears()}, "")
        gradients = [torch.empty_like(parameter) for parameter in adapters]
        for parameter, gradient in zip(adapters, gradients, strict=True):
            parameter.grad = gradient
        with LiveBytes([*client.parameters(), *gradients]) as live:
            cut = forward()
            cut.backward(torch.empty_like(cut))
    return BlockTrace(kept, live.peak, alone.peak, layers, parameters)


def trace_head(head: HeadModel, rows: int, length: int) -> int:
    """The most bytes alive at one time in a step of the final norm, the head and the loss, without their weights.

    Parameters
    ----------
    head : HeadModel
        Its weights need no memory; it must not be used afterwards.
    rows, length : int
        Batch size and sequence length. Every position counts as labelled.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        head.to_empty(device="cpu").train()
        shape = rows, length, int(head.decoder.config.hidden_size)
        hidden = torch.empty(shape, dtype=head.dtype, requires_grad=True)
        targets = torch.zeros(rows * length, dtype=torch.long)
        with LiveBytes(head.parameters()) as live:
            head.losses(head.norm(hidden).flatten(0, 1), targets).sum().backward()
    peak: int = live.peak
    return peak


def _all_by_the_first(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The output of a mixture's experts for ``hidden``, ``(tokens, hidden)``, as if the first did all work."""

    def product(x: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)[0]
        y: Tensor = x @ (weight if experts.is_transposed else weight.T)
        return y.add_(getattr(experts, f"{name}_bias")[0]) if experts.has_bias else y

    rows = hidden[torch.arange(chosen.numel()) // chosen.shape[-1]]  # a copy for every expert of a token
    inner = experts._apply_gate(product(rows, "gate_up_proj")) if experts.has_gate else None
    outer = product(experts.act_fn(product(rows, "up_proj")) if inner is None else inner, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        outer = experts.post_expert_norm(outer)
    weighted: Tensor = outer * weights.reshape(-1, 1)
    return weighted.view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)


ExpertsInterface.register(EXPERTS, _all_by_the_first)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block and still alive.

    Parameters
    ----------
    given : Iterable[Tensor]
        Tensors that exist already; views of them do not count.

    Attributes
    ----------
    now, peak : int
        Bytes alive at the moment, and the most at one time.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {_storage(tensor) for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (number := _storage(tensor)) not in self._known:
                self._known.add(number)
                size = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self._free, number, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return result

    def _free(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def _keep(client: ClientModel, forward: Callable[[], Tensor]) -> tuple[int, dict[str, LayerTrace]]:
    """Bytes that the block keeps for backward without adapters, and its linear layers."""
    given = {_storage(tensor) for tensor in client.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding the tensors keeps the storages alive and the keys unique
    inputs: dict[str, Tensor] = {}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Masks and rotary tables are made once for all blocks."""
        given.update(_storage(x) for x in tree_leaves(kwargs) if isinstance(x, Tensor) and not x.requires_grad)

    def watch(linear: nn.Module, args: tuple[Any, ...], name: str) -> None:
        inputs[name] = args[0]

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in given:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    linears = {name.removeprefix(client.family.block_name(0) + "."): linear for name, linear in client.linears()}
    hooks = [linear.register_forward_pre_hook(partial(watch, name=name)) for name, linear in linears.items()]
    hooks.append(client.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
    client.decoder.enable_input_require_grads()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for hook in hooks:
        hook.remove()

    def layer(number: int, name: str) -> LayerTrace:
        out_features, in_features = shape_of(linears[name])
        x = inputs[name]
        if not takes_changes(client.dtype):  # every fp32 adapter over a lower precision keeps its own copy, in fp32
            return LayerTrace(in_features, out_features, number, x.numel() * 4)
        return LayerTrace(in_features, out_features, _storage(x), 0 if _storage(x) in kept else x.nbytes)

    layers = {name: layer(number, name) for number, name in enumerate(linears)}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), layers


def _numel(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number
