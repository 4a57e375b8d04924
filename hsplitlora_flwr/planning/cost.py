"""What a split point and ranks cost in memory (HSplitLoRA, section ARMSC).

Everything is read off the model's configuration: the model is built without memory for its weights, and one forward
pass of one block on shapes alone tells which tensors autograd would keep. So a plan for a 70B model needs no weights.

    memory = process + weights of the part + adapters x (parameter + gradient + optimizer states)
           + accumulated update or activations kept for backward, whichever is larger + the largest temporary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hsplitlora_flwr.lora.layers import shape_of, takes_changes
from hsplitlora_flwr.models.families import Family
from hsplitlora_flwr.models.loading import empty_model
from hsplitlora_flwr.models.split import ClientModel, client_part

ADAPTER_BYTES = 16
"""Per adapter parameter: the fp32 value, its gradient and Adam's two moments."""


class PlanError(ValueError):
    """No plan is possible; the text says for whom, and by how many bytes."""


@dataclass(frozen=True)
class Workload:
    """What one training step works on.

    Parameters
    ----------
    batch_size, sequence_length : int
        Of one micro-batch; the longest sequence counts.
    dtype : str
        Dtype of the frozen base.
    """

    batch_size: int
    sequence_length: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: its name, block and sizes, and what an adapter on it makes autograd keep."""

    name: str
    block: int
    in_features: int
    out_features: int
    input_id: int = field(compare=False)
    """Layers of a block with the same number read the same tensor; it is kept once."""
    input_bytes: int = field(compare=False)
    """Bytes of that tensor when a block without adapters would not keep it, else 0."""

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of an adapter of ``rank``."""
        return rank * (self.in_features + self.out_features)


class CostModel:
    """Memory of clients and server as a function of split points and ranks.

    Parameters
    ----------
    config : PretrainedConfig
        The model's configuration.
    family : Family
        Its layout.
    workload : Workload
        Batch, length and dtype of a step.
    targets : tuple of str, optional
        Names of the linear layers that may get an adapter; all when None.

    Raises
    ------
    PlanError
        If ``targets`` names a layer that the model does not have.
    """

    def __init__(
        self, config: PretrainedConfig, family: Family, workload: Workload, targets: tuple[str, ...] | None = None
    ) -> None:
        model = empty_model(config, workload.dtype)
        self.num_blocks = int(config.num_hidden_layers)
        self.workload = workload
        self._item = torch.empty((), dtype=getattr(torch, workload.dtype)).itemsize
        blocks = list(model.get_submodule(family.decoder).get_submodule(family.blocks).children())
        self.block_parameters = [sum(p.numel() for p in block.parameters()) for block in blocks]
        embeddings = [getattr(model.get_submodule(family.decoder), name, None) for name in family.embeddings]
        self.embedding_parameters = sum(p.numel() for part in embeddings if part is not None for p in part.parameters())
        self.total_parameters = sum(p.numel() for p in model.parameters())
        heads = int(config.num_attention_heads)
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        probe = _trace_block(client_part(model, family, 1), workload, head_size)
        self.block_bytes = probe.kept
        self.temporary_bytes = probe.largest * 4  # two operands, a result and a gradient at a time
        self.cut_bytes = workload.batch_size * workload.sequence_length * int(config.hidden_size) * self._item
        self.all_layers = [
            Layer(family.block_name(index) + "." + name, index, shape[1], shape[0], *probe.inputs[name])
            for index in range(self.num_blocks)
            for name, shape in probe.shapes.items()
        ]
        self.layers = [
            layer for layer in self.all_layers if targets is None or layer.name.rpartition(".")[2] in targets
        ]
        self.linear_parameters = sum(rows * columns for rows, columns in probe.shapes.values())
        if targets is not None:
            known = {name.rpartition(".")[2] for name in probe.shapes}
            if missing := [target for target in targets if target not in known]:
                raise PlanError(f"lora.targets names {missing}; the blocks of this model have {sorted(known)}")

    def client_parameters(self, split: int) -> int:
        """Base parameters of a client: embeddings and its blocks."""
        return int(self.embedding_parameters) + sum(self.block_parameters[:split])

    def client_bytes(self, split: int, ranks: Mapping[str, int], process_bytes: int = 0) -> int:
        """Predicted peak memory of a client process.

        Parameters
        ----------
        split : int
            Number of its blocks.
        ranks : Mapping[str, int]
            By absolute layer name; layers at or above ``split`` are not the client's and do not count.
        process_bytes : int
            What the process takes before it loads anything (measured).
        """
        return (
            process_bytes
            + self.client_parameters(split) * self._item
            + self.adapter_bytes(ranks, 0, split)
            + self._kept_and_update(self.kept_bytes(ranks, 0, split), self.update_bytes(split))
            + self.temporary_bytes
            + 4 * self.cut_bytes  # the activation and its gradient, each as a tensor and as a frame
        )

    def server_bytes(self, clients: Mapping[str, tuple[int, Mapping[str, int]]], process_bytes: int = 0) -> int:
        """Predicted peak memory of the server: one base, and for each client ``(split, ranks)`` its own part."""
        whole = self.total_parameters * self._item
        return process_bytes + whole + sum(self.server_share(split, ranks) for split, ranks in clients.values())

    def server_share(self, split: int, ranks: Mapping[str, int]) -> int:
        """What one client costs the server: its adapters and activations from ``split`` up."""
        return (
            self.adapter_bytes(ranks, split, self.num_blocks)
            + self.kept_bytes(ranks, split, self.num_blocks, everything=True)
            + self.temporary_bytes
            + 4 * self.cut_bytes
        )

    def adapter_parameters(self, ranks: Mapping[str, int]) -> int:
        """Trainable parameters of a client, both sides together."""
        return sum(layer.adapter_parameters(ranks.get(layer.name, 0)) for layer in self.layers)

    def adapter_bytes(self, ranks: Mapping[str, int], first: int, last: int) -> int:
        """Adapters of blocks ``first .. last - 1`` with their gradients and optimizer states."""
        layers = (layer for layer in self.layers if first <= layer.block < last)
        return sum(layer.adapter_parameters(ranks.get(layer.name, 0)) for layer in layers) * ADAPTER_BYTES

    def kept_bytes(self, ranks: Mapping[str, int], first: int, last: int, *, everything: bool = False) -> int:
        """Activations that blocks ``first .. last - 1`` keep for backward.

        Below the lowest adapter no gradient is needed and nothing is kept, unless ``everything`` says that the input of
        the first block asks for its gradient, as the cut activation does on the server.
        """
        adapted = [layer for layer in self.layers if first <= layer.block < last and ranks.get(layer.name, 0)]
        if not adapted and not everything:
            return 0
        lowest = first if everything else min(layer.block for layer in adapted)
        inputs = {(layer.block, layer.input_id): layer.input_bytes for layer in adapted}
        rows = self.workload.batch_size * self.workload.sequence_length
        low = sum(ranks[layer.name] for layer in adapted) * rows * max(self._item, 4)
        return (last - lowest) * self.block_bytes + sum(inputs.values()) + low

    def adapter_price(self, layer: Layer, rank: int) -> int:
        """What one more adapter adds to :meth:`adapter_bytes` and :meth:`kept_bytes`, its input apart."""
        rows = self.workload.batch_size * self.workload.sequence_length
        return layer.adapter_parameters(rank) * ADAPTER_BYTES + rank * rows * max(self._item, 4)

    def _kept_and_update(self, kept: int, update: int) -> int:
        """An update that goes into the weights is gone before training starts; one beside them stays."""
        return max(kept, update) if takes_changes(getattr(torch, self.workload.dtype)) else kept + update

    def update_bytes(self, split: int) -> int:
        """The accumulated update of the client's blocks at its largest: the dense fp32 matrices, in a message."""
        return split * self.linear_parameters * 4


@dataclass(frozen=True)
class _BlockTrace:
    kept: int
    largest: int
    shapes: dict[str, tuple[int, int]]
    inputs: dict[str, tuple[int, int]]


def _trace_block(client: ClientModel, workload: Workload, head_size: int) -> _BlockTrace:
    """Run the first block on shapes alone and see what autograd keeps."""
    client = client.to("meta")
    rows, length = workload.batch_size, workload.sequence_length
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    # A finished mask: models look into the values of a plain one, and there are none here.
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
    given = {_storage(tensor) for tensor in (*client.parameters(), mask)}
    kept: dict[int, Tensor] = {}  # by storage; holding the tensors keeps the storages alive and the keys unique
    inputs: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    largest = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal largest
        if _storage(tensor) not in given:
            largest = max(largest, _fused_bytes(tensor, length, head_size))
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    prefix = client.family.block_name(0) + "."
    for full_name, linear in client.linears():
        name = full_name.removeprefix(prefix)
        shapes[name] = shape_of(linear)
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    client.decoder.enable_input_require_grads()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        client.decoder(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    if takes_changes(getattr(torch, workload.dtype)):
        new = {name: (_storage(x), 0 if _storage(x) in kept else x.nbytes) for name, x in inputs.items()}
    else:  # every fp32 adapter over a base of lower precision keeps an fp32 copy of its input
        new = {name: (number, x.numel() * 4) for number, (name, x) in enumerate(inputs.items())}
    return _BlockTrace(sum(_fused_bytes(t, length, head_size) for t in kept.values()), largest, shapes, new)


def _fused_bytes(tensor: Tensor, length: int, head_size: int) -> int:
    """Bytes of a kept tensor.

    On shapes alone attention runs unfused and keeps its (seq, seq) scores. The fused kernels that really run keep their
    output and one number per row instead.
    """
    if tensor.ndim == 4 and tensor.shape[-2:] == (length, length) and tensor.is_floating_point():
        return tensor.shape[0] * tensor.shape[1] * length * (head_size + 1) * tensor.itemsize
    return int(tensor.untyped_storage().nbytes())


def _storage(tensor: Tensor) -> int:
    return id(tensor.untyped_storage())
