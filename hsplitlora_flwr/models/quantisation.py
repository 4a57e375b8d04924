"""A frozen base whose weights take 8 or 4 bits each, through bitsandbytes.

The linear layers of the blocks are quantised one by one as they are loaded; embeddings, norms and head stay in the
dtype of the base.

    8bit   int8, and the largest magnitude of each row in fp32 (the weights of LLM.int8(), arXiv 2208.07339)
    4bit   nf4, and the largest magnitude of each 64 numbers in fp32 (QLoRA, arXiv 2305.14314, quantised once)

These are the weights that transformers makes of the same checkpoint with ``BitsAndBytesConfig``. A layer dequantises
its weight for every product with it, forward and backward, and keeps nothing of that. Activations are never rounded, so
it computes what a linear layer with the dequantised weight does, on every device.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.config.names import QUANTISATIONS

BLOCK = 64
"""Numbers of nf4 that share a scale."""
_PIECE = 2**20
"""Numbers that are quantised at a time, in several times their own memory; a multiple of :data:`BLOCK`."""


def check_quantiser(quantise: str) -> None:
    """Load the library that ``quantise`` needs, so that its absence shows before anything else is loaded.

    Raises
    ------
    ValueError
        If ``quantise`` is not one of :data:`~hsplitlora_flwr.config.names.QUANTISATIONS`.
    ModuleNotFoundError
        If the library is not installed.
    """
    if quantise not in QUANTISATIONS:
        raise ValueError(f"quantise={quantise!r} is not known; choose one of {', '.join(QUANTISATIONS)}")
    if quantise != "none":
        _functional()


def weight_bytes(out_features: int, in_features: int, item: int, quantise: str) -> int:
    """Bytes of a weight ``(out, in)``, with its scales, over a base whose numbers take ``item`` bytes."""
    numbers = out_features * in_features
    if quantise == "8bit":
        return numbers + 4 * out_features
    if quantise == "4bit":
        return -(-numbers // 2) + 4 * -(-numbers // BLOCK)
    return numbers * item


def dequantised_bytes(numbers: int, item: int, quantise: str) -> int:
    """Bytes that come and go with every product with a quantised weight; as for :func:`weight_bytes`."""
    if quantise == "none":
        return 0
    through_fp32 = item == 8 or (quantise == "8bit" and item != 4)
    return numbers * (item + (4 if through_fp32 else 0))


class QuantisedLinear(nn.Module):
    """A frozen linear layer that holds its weight in 8 or 4 bits, from :meth:`load` on.

    Before that it has the ``weight`` of ``linear``, as the place where it is to be loaded; after it there is none, so
    nothing can take packed integers for a weight.

    Parameters
    ----------
    linear : nn.Module
        The ``nn.Linear`` or ``Conv1D`` that it replaces.
    quantise : {"8bit", "4bit"}
        How it holds the weight.

    Attributes
    ----------
    out_features, in_features : int
        The shape of the weight.
    transposed : bool
        Whether the checkpoint stores the weight as ``(in, out)``, as Conv1D does.
    dtype : torch.dtype
        Of the base: of what :meth:`dequantised` gives.
    packed, scales : Tensor
        int8 ``(out, in)`` and fp32 ``(out,)``; or uint8 ``(out * in / 2, 1)`` and fp32 ``(out * in / 64,)``, both
        rounded up.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, quantise: str) -> None:
        super().__init__()
        self.quantise, self.transposed = quantise, isinstance(linear, Conv1D)
        self.weight, self.bias = linear.weight, linear.bias
        shape = self.weight.shape[::-1] if self.transposed else self.weight.shape
        self.out_features, self.in_features = shape
        self.dtype = self.weight.dtype
        self.register_buffer("packed", None)
        self.register_buffer("scales", None)

    @torch.no_grad()
    def load(self, weight: Tensor) -> None:
        """Quantise a weight, on its device, that is shaped as the checkpoint stores it, in the dtype of the base."""
        del self.weight
        self.dtype = weight.dtype
        weight = weight.T.contiguous() if self.transposed else weight
        functional, pieces = _functional(), []
        if self.quantise == "8bit":
            for rows in weight.split(max(_PIECE // self.in_features, 1)):
                packed, scales, _ = functional.int8_vectorwise_quant(rows.to(torch.float16))
                pieces.append((packed, scales))
        else:
            for piece in weight.flatten().split(_PIECE):
                packed, state = functional.quantize_4bit(
                    piece.to(_known(self.dtype)), blocksize=BLOCK, quant_type="nf4"
                )
                pieces.append((packed, state.absmax))
        self.packed, self.scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """The weight, ``(out, in)`` in the dtype of the base; made anew every time."""
        functional = _functional()
        if self.quantise == "8bit":
            dense: Tensor = functional.int8_vectorwise_dequant(self.packed, self.scales)
        else:
            state = functional.QuantState(
                self.scales,
                shape=torch.Size((self.out_features, self.in_features)),
                dtype=_known(self.dtype),
                blocksize=BLOCK,
                quant_type="nf4",
            )
            dense = functional.dequantize_4bit(self.packed, state)
        return dense.to(self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, quantise={self.quantise}"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    """``W x + b`` of which nothing is kept for backward: the weight is dequantised again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.dequantised(), linear.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.linear.dequantised(), None


def quantise_linears(blocks: nn.Module, quantise: str, without: Collection[str] = ()) -> None:
    """Make the linear layers inside ``blocks``, which are not loaded yet, hold their weights in 8 or 4 bits.

    Those that are called ``without`` inside their block stay as they are.
    """
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and name.partition(".")[2] not in without:
            blocks.set_submodule(name, QuantisedLinear(module, quantise))


def _known(dtype: torch.dtype) -> torch.dtype:
    """The library knows no fp64."""
    return torch.float32 if dtype == torch.float64 else dtype


@lru_cache(maxsize=1)
def _functional() -> Any:
    try:
        import bitsandbytes.functional as functional  # takes seconds
    except ImportError as error:
        raise ModuleNotFoundError(
            "a base in 8 or 4 bits (model.quantise) needs bitsandbytes: pip install 'hsplitlora_flwr[quantised]'"
        ) from error
    return functional
