"""From files to a model, or to one part of it, without ever holding more than that part.

A model is first built without memory for its weights. The part that this side needs is cut out, and only its tensors
are read: safetensors files are memory-mapped, so bytes that belong to the other side never enter the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.demo import demo_model, is_demo_model
from hsplitlora_flwr.models.families import FAMILIES, Family
from hsplitlora_flwr.models.placement import Place, follow, spread
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.quantisation import QuantisedLinear, check_quantiser, quantise_linears
from hsplitlora_flwr.models.split import (
    BodyModel,
    ClientModel,
    HeadModel,
    ServerModel,
    body_part,
    check_split,
    client_part,
    head_part,
    server_part,
)


class ModelFilesError(ValueError):
    """A model's files are missing, incomplete or not in a format that is read."""


def load_causal_lm(
    path: str, dtype: str = "float32", device: str | Sequence[str] = "cpu", quantise: str = "none"
) -> PreTrainedModel:
    """A whole causal LM, frozen, in evaluation mode.

    Parameters
    ----------
    path : str
        A folder with ``config.json`` and safetensors, a hub name, or ``smollm2-135m``.
    dtype : str
        ``float32``, ``bfloat16`` or ``float64``.
    device : str or Sequence[str]
        Where the weights go, for instance ``cpu`` or ``cuda:0``; over several devices they are spread.
    quantise : {"none", "8bit", "4bit"}
        How the linear layers of the blocks hold their weights; see :mod:`hsplitlora_flwr.models.quantisation`.

    Raises
    ------
    ModelFilesError
        If there are no weights to read.
    ModuleNotFoundError
        If what quantises is not installed.
    """
    check_quantiser(quantise)
    checkpoint = Checkpoint(path)
    model = empty_model(checkpoint.config, dtype, quantise)
    devices = [device] if isinstance(device, str) else device
    family = find_family(checkpoint.config) if len(devices) > 1 else None
    place = spread(model, family, devices) if family else lambda name: devices[0]
    _materialise({"": model}, checkpoint, dtype, place)
    if family:
        follow(model, family)
    model.requires_grad_(False).eval()
    return model


def load_client_model(
    path: str, split: int, dtype: str = "float32", device: str = "cpu", quantise: str = "none"
) -> ClientModel:
    """Embeddings and blocks ``0 .. split - 1``; no other tensor is read. As for :func:`load_client_parts`."""
    return load_client_parts(path, split, dtype, device, quantise, head=False)[0]


@overload
def load_client_parts(
    path: str, split: int, dtype: str = ..., device: str = ..., quantise: str = ..., *, head: Literal[True] = ...
) -> tuple[ClientModel, HeadModel]: ...
@overload
def load_client_parts(
    path: str, split: int, dtype: str = ..., device: str = ..., quantise: str = ..., *, head: bool
) -> tuple[ClientModel, HeadModel | None]: ...
def load_client_parts(
    path: str, split: int, dtype: str = "float32", device: str = "cpu", quantise: str = "none", *, head: bool = True
) -> tuple[ClientModel, HeadModel | None]:
    """What a client holds: embeddings and blocks ``0 .. split - 1``, and with ``head`` the final norm and the head.

    No other tensor is read. A head that is tied to the embeddings is one tensor with them.

    Parameters
    ----------
    path, dtype, device, quantise : str
        As for :func:`load_causal_lm`.
    split : int
        Number of blocks of the client, ``1 <= split <= L - 1``.
    head : bool
        Whether the client computes the loss, so that its labels stay with it.

    Raises
    ------
    ModelFilesError, SplitError, UnsupportedModelError
        If the files cannot be read, the split is out of range, or the model cannot be cut.
    ModuleNotFoundError
        If what quantises is not installed.
    """
    check_quantiser(quantise)
    checkpoint = Checkpoint(path)
    family = find_family(checkpoint.config)
    check_split(checkpoint.config, split)
    model = empty_model(checkpoint.config, dtype, quantise)
    client, top = client_part(model, family, split), head_part(model, family) if head else None
    modules = {f"{family.decoder}.": client.decoder} | ({"": top.causal_lm} if top else {})
    _materialise(modules, checkpoint, dtype, lambda name: device)
    return client, top


@overload
def split_model(
    model: PreTrainedModel | str, split: int, labels: Literal["server"] = ...
) -> tuple[ClientModel, ServerModel]: ...
@overload
def split_model(
    model: PreTrainedModel | str, split: int, labels: Literal["client"]
) -> tuple[ClientModel, BodyModel, HeadModel]: ...
def split_model(
    model: PreTrainedModel | str, split: int, labels: Literal["server", "client"] = "server"
) -> tuple[ClientModel, ServerModel] | tuple[ClientModel, BodyModel, HeadModel]:
    """Cut a causal LM after ``split`` blocks and, where the labels stay with the client, before its final norm as well.

    ``server(client(input_ids, attention_mask), attention_mask, labels).loss`` equals the unsplit model's loss, and so
    does ``head(body(client(input_ids, attention_mask), attention_mask), labels).loss``.

    Parameters
    ----------
    model : PreTrainedModel or str
        A Hugging Face causal LM, or what :func:`load_causal_lm` accepts. The parts share its tensors, which become
        frozen.
    split : int
        Number of blocks of the client, ``1 <= split <= L - 1``.
    labels : {"server", "client"}
        Who computes the loss.

    Returns
    -------
    tuple
        ``(client, server)``, or ``(client, body, head)`` where the labels stay with the client.

    Raises
    ------
    SplitError, UnsupportedModelError
        If ``split`` is out of range, or the model cannot be cut.
    ValueError
        If ``labels`` is neither.
    """
    if labels not in ("server", "client"):
        raise ValueError(f"labels={labels!r} is not possible; choose 'server' or 'client'")
    if isinstance(model, str):
        model = load_causal_lm(model)
    family = find_family(model.config)
    client = client_part(model, family, split)
    if labels == "client":
        return client, body_part(model, family, split), head_part(model, family)
    return client, server_part(model, family, split)


@lru_cache(maxsize=1)
def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model; ``path`` as for :func:`load_causal_lm`.

    Raises
    ------
    ModelFilesError
        If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(local_path(path))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"model.path={path}: no tokenizer can be loaded from it: {error}") from error


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Raises
    ------
    ModelFilesError
        If ``path`` is neither a model folder nor a model of the hub that can be reached.
    """
    folder = local_path(path)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ModelFilesError(
            f"model.path={path}: the folder holds no config.json; name a folder in Hugging Face format"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelFilesError(
            f"model.path={path}: no folder of that name, and not readable as a hub name: {error}"
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def check_model(path: str, split_min: int = 1, split_max: int = 0) -> Family:
    """Check, before anything is loaded, that a model has weights, can be cut, and allows the wanted splits.

    Raises
    ------
    ModelFilesError, SplitError, UnsupportedModelError
        With the value that is wrong and what to do.
    """
    checkpoint = Checkpoint(path)
    check_split(checkpoint.config, split_min)
    if split_max:
        check_split(checkpoint.config, split_max)
    return find_family(checkpoint.config)


def empty_model(
    config: PretrainedConfig, dtype: str = "float32", quantise: str = "none", experts: str | None = None
) -> PreTrainedModel:
    """A causal LM whose parameters have shapes but no memory; its computed buffers (rotary tables) are real.

    With ``quantise`` the linear layers of its blocks quantise what they load; ``experts`` is that of
    :func:`~hsplitlora_flwr.models.build.build_causal_lm`.
    """
    with init_empty_weights(include_buffers=False):
        model = build_causal_lm(config, getattr(torch, dtype), experts)
    model.tie_weights()
    if quantise != "none":
        family = find_family(config)
        quantise_linears(model.get_submodule(f"{family.decoder}.{family.blocks}"), quantise, family.unadapted)
    model.requires_grad_(False).eval()
    return model


class PartTensors:
    """The tensors of a client's part, without the part: to be compared with those of another machine.

    Parameters
    ----------
    path, split, dtype, head
        As for :func:`load_client_parts`; a split at the number of blocks is the whole model.

    Attributes
    ----------
    names : list of str
        Of the tensors, in the whole model.
    """

    def __init__(self, path: str, split: int, dtype: str, *, head: bool) -> None:
        self._checkpoint, self._dtype = Checkpoint(path), dtype
        model, family = empty_model(self._checkpoint.config, dtype), find_family(self._checkpoint.config)
        modules = {"": model}
        if split < len(model.get_submodule(f"{family.decoder}.{family.blocks}")):  # type: ignore[arg-type]
            client, top = client_part(model, family, split), head_part(model, family) if head else None
            modules = {f"{family.decoder}.": client.decoder} | ({"": top.causal_lm} if top else {})
        self._prefix = model.base_model_prefix
        tensors = {id(t): prefix + name for prefix, part in modules.items() for name, t in part.named_parameters()}
        self.names = list(tensors.values())

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Some of them with their values in the dtype of the run, one after another."""
        for name, tensor in self._checkpoint.tensors(names, self._prefix):
            yield name, tensor.to(getattr(torch, self._dtype))


class Checkpoint:
    """Tensors of a model by name, read one at a time from safetensors files in a folder or on the hub.

    Parameters
    ----------
    path : str
        As for :func:`load_causal_lm`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = read_config(path)
        index = self._file("model.safetensors.index.json")
        if index is not None:
            self._shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (single := self._file("model.safetensors")) is not None:
            with self._open(single) as tensors:
                self._shard_of = dict.fromkeys(tensors.keys(), single.name)
        else:
            raise ModelFilesError(
                f"model.path={path}: there are no weights (model.safetensors or model.safetensors.index.json); "
                "pickled weights are not read: load them with transformers and save_pretrained them once"
            )

    def tensors(self, names: list[str], prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors called ``names``, memory-mapped, shard by shard.

        Every tensor has a mapping of its own: pages that were read stay in memory for no longer than their tensor.

        ``prefix`` is the name of the base model inside the causal LM (``transformer`` for GPT-2): a checkpoint may hold
        names with it or without it.

        Raises
        ------
        ModelFilesError
            If a tensor is missing or its file damaged.
        """
        wanted: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            stored = self._stored_name(name, prefix)
            wanted.setdefault(self._shard_of[stored], []).append((name, stored))
        for shard, pairs in wanted.items():
            file = self._file(shard)
            if file is None:
                raise ModelFilesError(f"model.path={self.path}: the weight file {shard} is missing")
            for name, stored in pairs:
                with self._open(file) as tensors:
                    tensor = tensors.get_tensor(stored)
                yield name, tensor
                del tensor

    def tensor(self, name: str, prefix: str) -> Tensor:
        """One tensor, memory-mapped; as for :meth:`tensors`."""
        return next(self.tensors([name], prefix))[1]

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ModelFilesError(f"model.path={self.path}: the weight file {file.name} is damaged: {error}") from error

    def _stored_name(self, name: str, prefix: str) -> str:
        bare = name.removeprefix(f"{prefix}.")
        renamed = dict(renaming for family in FAMILIES for renaming in family.stored_as).get(name, name)
        for candidate in (name, renamed, bare, f"{prefix}.{name}"):
            if candidate in self._shard_of:
                return candidate
        raise ModelFilesError(f"model.path={self.path}: the weights hold no tensor '{name}'")

    def _file(self, name: str) -> Path | None:
        folder = Path(local_path(self.path))
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.path, name))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ModelFilesError(f"model.path={self.path}: {name} cannot be fetched from the hub: {error}") from error


def local_path(path: str) -> str:
    """The folder of the demonstration model, or ``path`` itself: a folder or a hub name."""
    return str(demo_model()) if is_demo_model(path) else path


def _materialise(modules: Mapping[str, PreTrainedModel], checkpoint: Checkpoint, dtype: str, place: Place) -> None:
    """Give the parameters of ``modules`` their values; a parameter is called the module's key + its name there."""
    tied: dict[int, list[tuple[str, nn.Module, str]]] = {}  # name, owner and attribute of one and the same parameter
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters(remove_duplicate=False):
            path, _, attribute = name.rpartition(".")
            tied.setdefault(id(parameter), []).append((prefix + name, module.get_submodule(path), attribute))
    by_first_name = {places[0][0]: places for places in tied.values()}
    base = next(iter(modules.values())).base_model_prefix
    for name, tensor in checkpoint.tensors(list(by_first_name), base):
        _, owner, attribute = by_first_name[name][0]
        wanted = getattr(owner, attribute).shape
        if tensor.shape != wanted:
            raise ModelFilesError(
                f"model.path={checkpoint.path}: '{name}' has shape {tuple(tensor.shape)}, "
                f"the configuration says {tuple(wanted)}"
            )
        tensor = tensor.to(device=place(name), dtype=getattr(torch, dtype))
        if isinstance(owner, QuantisedLinear) and attribute == "weight":
            owner.load(tensor)
            continue
        value = nn.Parameter(tensor, requires_grad=False)
        for _, owner, attribute in by_first_name[name]:
            setattr(owner, attribute, value)
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers(remove_duplicate=False):  # computed, not read
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, buffer.to(place(prefix + name)))
