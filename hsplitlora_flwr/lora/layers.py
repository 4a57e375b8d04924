"""Adapters: put into a model part, read out, and many clients' adapters over one frozen base.

A layer computes ``y = W x + s B A x`` with ``s = alpha / r``. ``W`` stays frozen and is shared by every part that was
cut from the same model; only ``A`` and ``B`` belong to one client, so a server that serves many clients keeps one base.
Adapters are known by the absolute name of their layer, on either side of the cut.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.update import Change
from hsplitlora_flwr.models.parts import ModelPart
from hsplitlora_flwr.models.quantisation import QuantisedLinear

FRESH_ROW = 3**-0.5
"""Length of a row of a fresh ``A``, in the mean square."""


@dataclass(frozen=True)
class AdapterSpec:
    """Rank, alpha and dropout of one adapter; its scale is ``alpha / rank``."""

    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The factor ``s`` in ``y = W x + s B A x``."""
        return self.alpha / self.rank


def start_along(directions: Factors, spec: AdapterSpec) -> Factors:
    """The start of an adapter whose ``A`` lies along given directions, with rows as long as those of a fresh one.

    Parameters
    ----------
    directions : tuple[Tensor, Tensor]
        A ``B`` without columns, ``(out, 0)``, and orthonormal rows ``(r, in)``, at most ``spec.rank`` of them; where
        there are fewer, the other rows of ``A`` start fresh.
    """
    b, rows = directions
    return b, rows * (FRESH_ROW * spec.scale)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter, or with the accumulated update, or with both.

    ``A`` is ``(r, in)`` and ``B`` is ``(out, r)``, fp32 (fp64 over an fp64 base). ``A`` starts Kaiming-uniform from a
    generator seeded by ``seed``, and ``B`` at zero, so a new adapter changes nothing.
    """

    is_adapted_linear = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.spec: AdapterSpec | None = None
        self.change: Change | None = None
        self.dropout: nn.Module = nn.Identity()

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that looks at its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def add_adapter(self, spec: AdapterSpec, seed: int, start: Factors | None = None) -> None:
        """Give the layer an adapter: a fresh one, or one that goes on from ``start`` (scale folded into ``A``).

        A ``start`` of lower rank fills the first rows of ``A`` and columns of ``B``; the others are fresh. Its ``B``
        may have fewer columns than its ``A`` has rows.
        """
        out_features, in_features = shape_of(self.base)
        base_dtype, device = _kind_of(self.base)
        dtype = torch.promote_types(base_dtype, torch.float32)
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT
        a = torch.empty(spec.rank, in_features, dtype=torch.float64)
        b = torch.zeros(out_features, spec.rank, dtype=torch.float64)
        if device != torch.device("meta"):
            # drawn row by row: an adapter of lower rank starts as the first rows of one of higher rank
            a.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        if start is not None:
            known_b, known_a = start
            b[:, : known_b.shape[1]], a[: len(known_a)] = known_b.double(), known_a.double() / spec.scale
        self.spec = spec
        # a dropout of 0 would still copy its input, and the copy would be kept for backward
        self.dropout = SeededDropout(spec.dropout, seed) if spec.dropout else nn.Identity()
        self.lora_A = nn.Parameter(a.to(device, dtype))
        self.lora_B = nn.Parameter(b.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y: Tensor = self.base(rows)
        if self.change is not None:
            y = y + self.change.apply(rows.to(torch.float32)).to(y.dtype)
        if self.spec is not None:
            # In place: a tensor of this size that comes and goes takes longer than what is calculated in it.
            if y.dtype == self.lora_A.dtype:
                y.addmm_(self._down(rows), self.lora_B.T, alpha=self.spec.scale)
            else:
                y.add_(self.low_rank(rows).to(y.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def low_rank(self, x: Tensor) -> Tensor:
        """The adapter's own term ``s B A x``, in the adapter's dtype; only where there is an adapter."""
        assert self.spec is not None
        return nn.functional.linear(self._down(x) * self.spec.scale, self.lora_B)

    def _down(self, x: Tensor) -> Tensor:
        """``A x``, with dropout of ``x``."""
        return nn.functional.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)


def has_adapter(linear: nn.Module) -> bool:
    """Whether a linear layer carries an adapter; it may carry the accumulated update alone."""
    return isinstance(linear, AdaptedLinear) and linear.spec is not None


class SeededDropout(nn.Module):
    """Dropout whose masks follow from a seed and the micro-batch, on whatever thread they are drawn.

    A layer then drops the same inputs whether its model is cut or not, whichever clients train beside it, and when a
    forward pass is computed again (:func:`draw_masks`). Masks are drawn where the layer lies: all CPUs draw the same,
    and all GPUs of one kind.

    Attributes
    ----------
    drawn : int
        Which mask the next forward pass has.
    """

    def __init__(self, probability: float, seed: int) -> None:
        super().__init__()
        self._keep = 1 - probability
        self._seed = seed
        self.draw(0, 0)

    def draw(self, step: int, index: int) -> None:
        """Go on with the mask of a micro-batch."""
        self.drawn = _number(f"{self._seed}/{step}/{index}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        generator = torch.Generator(x.device).manual_seed(self.drawn)
        self.drawn += 1
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(self._keep, generator=generator)
        return x * mask.div_(self._keep)


def dropouts(module: nn.Module) -> Iterator[SeededDropout]:
    """The dropout of every adapter inside ``module``."""
    return (inside for inside in module.modules() if isinstance(inside, SeededDropout))


@contextmanager
def same_masks(parts: Iterable[nn.Module]) -> Iterator[None]:
    """After the block, ``parts`` draw the masks that they would have drawn in it."""
    drawn = [(dropout, dropout.drawn) for part in parts for dropout in dropouts(part)]
    try:
        yield
    finally:
        for dropout, number in drawn:
            dropout.drawn = number


def draw_masks(part: ModelPart, step: int, index: int) -> None:
    """Make the next forward pass of ``part`` drop what belongs to micro-batch ``index`` of global step ``step``."""
    for dropout in dropouts(part):
        dropout.draw(step, index)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def inject(
    part: ModelPart,
    specs: Mapping[str, AdapterSpec],
    seed: str,
    start: Mapping[str, Factors] | None = None,
    *,
    freeze_a: bool = False,
) -> list[nn.Parameter]:
    """Give adapters to those layers of ``part`` that ``specs`` names.

    Parameters
    ----------
    part : ModelPart
        Either side.
    specs : Mapping[str, AdapterSpec]
        By absolute layer name, for the whole model; layers of the other side are passed over.
    seed : str
        Any text; with the layer's name it fixes the adapter's start, on whichever side the layer is.
    start : Mapping[str, Factors], optional
        Adapters to go on from, by absolute layer name, scale folded in and of no higher rank than asked for; other
        layers start fresh.
    freeze_a : bool
        Train ``B`` alone.

    Returns
    -------
    list of nn.Parameter
        What trains: ``A`` and ``B`` of every adapter, in the order of the layers.
    """
    parameters: list[nn.Parameter] = []
    for name, module in list(part.linears()):
        if name in specs:
            layer = _adapted(part, name, module)
            layer.add_adapter(specs[name], _number(f"{seed}/{name}"), (start or {}).get(name))
            layer.lora_A.requires_grad_(not freeze_a)
            parameters += [layer.lora_B] if freeze_a else [layer.lora_A, layer.lora_B]
    return parameters


def extract(part: ModelPart) -> dict[str, Factors]:
    """The adapters of ``part`` by absolute layer name: detached copies ``(B, s A)`` on the CPU, the scale folded in."""
    return {
        name: (module.lora_B.detach().cpu().clone(), module.lora_A.detach().cpu() * module.spec.scale)
        for name, module in part.linears()
        if isinstance(module, AdaptedLinear) and module.spec is not None
    }


def takes_changes(dtype: torch.dtype, quantise: str = "none") -> bool:
    """Whether weights of a base hold an fp32 update exactly: then it is merged, else attached beside them.

    Parameters are those of :func:`hsplitlora_flwr.models.load_causal_lm`. Quantised weights hold none.
    """
    return quantise == "none" and dtype in (torch.float32, torch.float64)


def merge_changes(part: ModelPart, changes: Mapping[str, Change], original: Callable[[str], Tensor]) -> None:
    """Make the weights of ``part`` ``W_0 + change``, in place, for all parts that share them.

    The sum starts from ``W_0`` every time, so rounding does not pile up over rounds. It is exact to fp32 rounding over
    an fp32 base; over a base of lower precision use :func:`attach_changes`.

    Parameters
    ----------
    part : ModelPart
        Either side; layers of the other side are passed over.
    changes : Mapping[str, Change]
        The accumulated update by absolute layer name.
    original : Callable[[str], Tensor]
        Gives ``W_0`` of a layer, as the checkpoint stores it.

    Raises
    ------
    TypeError
        If a weight is quantised.
    """
    for name, module in part.linears():
        if name in changes:
            weight = _weight(module)
            dense = changes[name].dense().to(weight.device)
            start = original(name).to(weight.device)
            with torch.no_grad():
                weight.copy_(start.to(torch.promote_types(weight.dtype, dense.dtype)) + as_stored(module, dense))


def reset_weights(part: ModelPart, names: Iterable[str], original: Callable[[str], Tensor]) -> None:
    """Make the named weights ``W_0`` again, in place; ``original`` as for :func:`merge_changes`."""
    wanted = set(names)
    for name, module in part.linears():
        if name in wanted:
            with torch.no_grad():
                _weight(module).copy_(original(name))


def attach_changes(part: ModelPart, changes: Mapping[str, Change]) -> None:
    """Make the layers of ``part`` compute ``W_0 x + change x``, the second term in fp32 beside an untouched weight.

    Parameters are those of :func:`merge_changes`. This stays exact over a bf16 or quantised base.
    """
    for name, module in list(part.linears()):
        if name in changes:
            layer = _adapted(part, name, module)
            layer.change = changes[name].to(_kind_of(layer.base)[1])


def as_stored(linear: nn.Module, matrix: Tensor) -> Tensor:
    """An ``(out, in)`` matrix in the orientation in which ``linear`` stores its weight."""
    return matrix.T if _is_transposed(linear) else matrix


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer; GPT-2's Conv1D stores its weight transposed."""
    if isinstance(linear, QuantisedLinear):
        return linear.out_features, linear.in_features
    rows, columns = _weight(linear).shape
    return (columns, rows) if _is_transposed(linear) else (rows, columns)


def dense_weight(linear: nn.Module) -> Tensor:
    """The frozen weight of a linear layer, ``(out, in)``; a quantised one is dequantised for this call."""
    if isinstance(linear, QuantisedLinear):
        return linear.dequantised()
    weight = _weight(linear)
    return weight.T if _is_transposed(linear) else weight


def _is_transposed(linear: nn.Module) -> bool:
    return isinstance(linear.base if isinstance(linear, AdaptedLinear) else linear, Conv1D)


def _kind_of(linear: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a layer's products."""
    if isinstance(linear, QuantisedLinear):
        return linear.dtype, linear.packed.device
    weight = _weight(linear)
    return weight.dtype, weight.device


def _weight(linear: nn.Module) -> Tensor:
    if isinstance(linear, QuantisedLinear):
        raise TypeError(f"a weight in {linear.quantise} takes no update; put the update beside it with attach_changes")
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _adapted(part: ModelPart, name: str, module: nn.Module) -> AdaptedLinear:
    if isinstance(module, AdaptedLinear):
        return module
    layer = AdaptedLinear(module)
    layer.train(module.training)
    part.replace(name, layer)
    return layer
