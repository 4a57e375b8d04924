"""Where a model lies: on one device, or over several that are too small for all of it.

Over several, blocks stay in order and whole, and every device gets about the same number of bytes. What comes into the
embeddings, a block, the final norm or the head is moved to where that lies, forward and backward. Parts that are cut
from such a model do the same; other code asks a part for its device, and a tensor for the one that it is on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from hsplitlora_flwr.config import ConfigError
from hsplitlora_flwr.models.families import Family
from hsplitlora_flwr.schema import scalar

Place = Callable[[str], str]
"""The device of a parameter or buffer of a model, by its name."""


def pick_device(name: str) -> str:
    """``auto`` and ``balanced`` become ``cuda`` where a GPU is, else ``cpu``; other names stay."""
    if name in ("auto", "balanced"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def pick_devices(name: str) -> list[str]:
    """All GPUs for ``balanced``; else the one of :func:`pick_device`."""
    if name == "balanced" and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [pick_device(name)]


def gpus_of(devices: Sequence[str]) -> list[str]:
    """Those of these devices, by torch's names, that have memory of their own."""
    return [name for name in devices if name.startswith("cuda")]


def on_gpus(name: str) -> bool:
    """Whether a model lies on GPUs by a name of :func:`pick_devices`."""
    return bool(gpus_of(pick_devices(name)))


def check_gpu_memory(setting: str, stated: float | tuple[float, ...] | None, name: str) -> None:
    """Raise :class:`ConfigError` if memory of a GPU is stated where a name of :func:`pick_devices` is of none."""
    if stated and not on_gpus(name):
        raise ConfigError(
            f"{setting}={scalar(stated)} is of a GPU, and model.device={name} trains on the CPU here; state memory-gb "
            "(clients.memory_gb, plan.server_memory_gb) in its place"
        )


def check_device(name: str) -> None:
    """Raise :class:`ConfigError` if a name of :func:`pick_devices` is of a GPU that is not here."""
    if not name.startswith("cuda"):
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name.partition(":")[2] or 0) >= gpus:
        raise ConfigError(
            f"model.device={name}, and "
            + (f"the GPUs here are cuda:0 to cuda:{gpus - 1}" if gpus else "there is no GPU here that torch can use")
            + "; name another, or auto"
        )


def spread(model: PreTrainedModel, family: Family, devices: Sequence[str]) -> Place:
    """Give every device about the same number of bytes of ``model``, which need not have memory yet.

    Embeddings come first and the final norm last; the head lies with the norm, or, where it is tied, with the
    embeddings.
    """
    decoder = model.get_submodule(family.decoder)
    blocks = decoder.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    own = [sum(_bytes(t) for t in _tensors(block)) for block in blocks]
    ahead = sum(_bytes(t) for name in family.embeddings for t in _tensors(getattr(decoder, name, None)))
    total = sum({id(t): _bytes(t) for t in _tensors(model)}.values())
    bounds = [total * (index + 1) / len(devices) for index in range(len(devices) - 1)]
    middles = [ahead + end - size / 2 for end, size in zip(accumulate(own), own, strict=True)]
    block_devices = [devices[bisect_right(bounds, middle)] for middle in middles]
    tied = any(a is b for a in _tensors(model.get_input_embeddings()) for b in _tensors(model.get_output_embeddings()))
    last = (*(f"{family.decoder}.{name}." for name in family.final), *(() if tied else (_name_of_head(model),)))
    inside = f"{family.decoder}.{family.blocks}."

    def place(name: str) -> str:
        if name.startswith(inside):
            return block_devices[int(name.removeprefix(inside).partition(".")[0])]
        return devices[-1] if name.startswith(last) else devices[0]

    return place


def follow(model: PreTrainedModel, family: Family) -> None:
    """Make every piece of ``model`` move what comes into it to where it lies."""
    decoder = model.get_submodule(family.decoder)
    ends = [getattr(decoder, name, None) for name in (*family.embeddings, *family.final)]
    for module in (*ends, *decoder.get_submodule(family.blocks).children(), model.get_output_embeddings()):
        if module is not None:
            module.register_forward_pre_hook(_bring, with_kwargs=True)


def device_of(module: nn.Module) -> torch.device:
    """Where a module lies that is all in one place."""
    return next(_tensors(module)).device


def _bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # a cache's tensors come to it from the block itself
    return send_to_device((args, kwargs), device_of(module), skip_keys=["past_key_values"])


def _tensors(module: nn.Module | None) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers()) if module is not None else iter(())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _name_of_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(f"{name}." for name, module in model.named_modules() if module is head)
