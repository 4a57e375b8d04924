"""What a node may use: as its configuration states it, else as the run's settings do, else as measured.

flower-supernode ... --node-config 'memory-gb=6 gflops=900 mbit-up=50 mbit-down=200 adapter-mb=20'
flower-supernode ... --node-config 'gpu-memory-gb=24 memory-gb=4'
flower-supernode ... --node-config 'budget="measured"'

A plan is about the memory where the model lies. On a GPU that is what tensors take there; what the process takes in the
machine is a second number, with a bound of its own.
"""

from __future__ import annotations

import time

import torch
from flwr.app import Context

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.models.placement import check_gpu_memory, pick_device
from hsplitlora_flwr.training.memory import free_bytes

USABLE = 0.9
"""Share of free memory that a measured budget takes; the rest is for what else the machine does."""
_SPEEDS = ("gflops", "mbit-up", "mbit-down")


def is_measured(context: Context, config: Config) -> bool:
    """Whether what this node may use is measured: it says so, or nobody says anything."""
    stated = context.node_config.get("budget")
    if stated not in (None, "measured"):
        raise ConfigError(f'budget={stated!r} of the node is unknown; write budget="measured", or memory-gb=NUMBER')
    says_something = any(name in context.node_config for name in ("memory-gb", "gpu-memory-gb", *_SPEEDS))
    return stated is not None or not (says_something or config.clients.memory_gb or config.clients.gpu_memory_gb)


def load_memory_budget(context: Context, config: Config) -> int:
    """Memory for the model, in bytes: ``memory-gb`` of the node's configuration, else the entry of
    ``clients.memory_gb`` for its partition, else 90 % of what is free.

    On a GPU it is of the GPU: ``gpu-memory-gb`` and ``clients.gpu_memory_gb`` come first, and the others stand for
    them where nobody states these.

    Raises
    ------
    ConfigError
        If the node states something that is not a number above 0, or memory of a GPU that it does not train on.
    """
    device = config.model.device
    there = _memory(context, config, "gpu-memory-gb")
    check_gpu_memory("gpu-memory-gb", there and there / 1e9, device)
    return there or _memory(context, config, "memory-gb") or int(USABLE * free_bytes([pick_device(device)]))


def host_memory_budget(context: Context, config: Config) -> int:
    """What the process of a node may take in the machine while its model lies on a GPU, in bytes: ``memory-gb`` beside
    ``gpu-memory-gb``, or the same of ``clients``; 0 where nobody says both."""
    return _memory(context, config, "gpu-memory-gb") and _memory(context, config, "memory-gb")


def stated_speeds(context: Context, config: Config) -> tuple[float, float, float]:
    """Operations/s, and bytes/s to and from the server, of the node's configuration, else of ``clients``; 0 where
    nobody says them."""
    gflops, up, down = (_speed(context, config, name) for name in _SPEEDS)
    return gflops * 1e9, up * 1e6 / 8, down * 1e6 / 8


def adapter_bytes(context: Context, config: Config) -> int:
    """Adapters that this node may send in a round, in bytes: ``adapter-mb`` of its configuration, else its entry of
    ``clients.adapter_mb``; 0 where nobody sets a bound."""
    return int(_speed(context, config, "adapter-mb") * 1e6)


def measured_flops(config: Config) -> float:
    """Operations/s of this node: matrix products in the base's dtype, for about a third of a second."""
    device, dtype = pick_device(config.model.device), getattr(torch, config.model.dtype)
    size = 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    total = 0.0
    a @ b  # the first product loads kernels
    _wait_for(device)
    started = time.perf_counter()
    while time.perf_counter() - started < 0.3:
        for _ in range(8):
            a @ b
        _wait_for(device)
        total += 8 * 2.0 * size**3
    return total / (time.perf_counter() - started)


def partition_of(context: Context) -> tuple[int, int]:
    """Index and number of partitions of this node.

    Raises
    ------
    ConfigError
        If the node's configuration does not say them.
    """
    try:
        return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as missing:
        raise ConfigError(
            f"the node's configuration has no {missing}; start it with --node-config 'partition-id=0 num-partitions=3'"
        ) from None


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _stated(context: Context, name: str) -> float:
    """A number of the node's configuration; 0 where it states none."""
    stated = context.node_config.get(name)
    if stated is None:
        return 0.0
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated > 0:
        raise ConfigError(f"{name}={stated!r} of the node must be a number above 0")
    return float(stated)


def _memory(context: Context, config: Config, name: str) -> int:
    """Of the node's configuration, else of ``clients`` where the node is not to be measured; 0 where nobody says it."""
    if stated := _stated(context, name):
        return int(stated * 1e9)
    sizes: tuple[float, ...] = getattr(config.clients, name.replace("-", "_"))
    if not sizes or is_measured(context, config):
        return 0
    return int(sizes[partition_of(context)[0] % len(sizes)] * 1e9)


def _speed(context: Context, config: Config, name: str) -> float:
    speeds: tuple[float, ...] = getattr(config.clients, name.replace("-", "_"))
    return _stated(context, name) or (speeds[partition_of(context)[0] % len(speeds)] if speeds else 0.0)
