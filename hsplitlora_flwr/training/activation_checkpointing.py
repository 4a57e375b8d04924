"""Activation checkpointing (arXiv 1604.06174): activations are recomputed in the backward pass instead of being kept.

A block then keeps its input alone. Its forward pass runs a second time when its gradients are due, so at any time the
activations of one block exist: memory for time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsplitlora_flwr.lora.layers import SeededDropout, dropouts
from hsplitlora_flwr.lora.multi_adapter import MultiAdapterLinear
from hsplitlora_flwr.models.parts import ModelPart


def checkpoint_blocks(part: ModelPart) -> None:
    """Make every block of ``part`` keep its input alone; outputs and gradients stay what they are."""
    for block in part.blocks:
        block.forward = _again(block, block.forward)


def _again(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # By the time it runs again, the masks of another micro-batch may have been drawn.
        masks = [(module, module.drawn) for module in _dropouts(block)]

        def once(*args: Any, **kwargs: Any) -> Any:
            now = [(module, module.drawn) for module, _ in masks]
            for module, drawn in masks:
                module.drawn = drawn
            try:
                return forward(*args, **kwargs)
            finally:
                for module, drawn in now:
                    module.drawn = drawn

        return checkpoint(once, *args, use_reentrant=False, **kwargs)

    return run


def _dropouts(block: nn.Module) -> Iterator[SeededDropout]:
    """Of the block's own adapters, and of those of the clients whose examples its multi-adapter layers hold."""
    for module in block.modules():
        if isinstance(module, SeededDropout):
            yield module
        elif isinstance(module, MultiAdapterLinear):
            for adapter in module.adapters:
                yield from dropouts(adapter)
