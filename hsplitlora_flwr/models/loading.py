"""From files to a model, or to one part of it, without ever holding more than that part.

A model is first built without memory for its weights. The part that this side needs is cut out, and only its tensors
are read: safetensors files are memory-mapped, so bytes that belong to the other side never enter the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, overload

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from hsplitlora_flwr.models.checkpoint import Checkpoint, ModelFilesError, local_path
from hsplitlora_flwr.models.configuration import read_config, read_stored_config
from hsplitlora_flwr.models.conversion import take_quantisation
from hsplitlora_flwr.models.families import Family
from hsplitlora_flwr.models.multimodal import prove_text_decoder
from hsplitlora_flwr.models.parts import BodyModel, ClientModel, HeadModel, ServerModel
from hsplitlora_flwr.models.placement import Place, follow, spread
from hsplitlora_flwr.models.proof import find_family
from hsplitlora_flwr.models.quantisation import QuantisedLinear, check_quantiser
from hsplitlora_flwr.models.split import body_part, check_split, client_part, head_part, server_part
from hsplitlora_flwr.models.stored import StoredModel


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
        If there are no weights to read, or they do not fit the model.
    ModuleNotFoundError
        If what quantises is not installed.
    """
    check_quantiser(quantise)
    stored = StoredModel(path, dtype, quantise)
    model = stored.model
    devices = [device] if isinstance(device, str) else device
    family = find_family(stored.config) if len(devices) > 1 else None
    place = spread(model, family, devices) if family else lambda name: devices[0]
    _materialise({"": model}, stored, place)
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
    config = read_config(path)
    family = find_family(config)
    check_split(config, split)
    stored = StoredModel(path, dtype, quantise, head=head)
    client, top = client_part(stored.model, family, split), head_part(stored.model, family) if head else None
    modules = {f"{family.decoder}.": client.decoder} | ({"": top.causal_lm} if top else {})
    _materialise(modules, stored, lambda name: device)
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


def check_model(path: str, split_min: int = 1, split_max: int = 0) -> Family:
    """Check, before anything is loaded, that a model has all its weights, can be cut, and allows the wanted splits.

    Tensors in the files that the model has no place for are logged.

    Raises
    ------
    ModelFilesError, SplitError, UnsupportedModelError
        With the value that is wrong and what to do.
    """
    config, stored = read_config(path), read_stored_config(path)
    Checkpoint(path)  # whether there are weights at all
    family = find_family(config)
    take_quantisation(stored)
    prove_text_decoder(stored)
    check_split(config, split_min)
    if split_max:
        check_split(config, split_max)
    StoredModel(path).check()
    return family


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
        config = read_config(path)
        family, is_whole = find_family(config), split >= config.num_hidden_layers
        self._stored = StoredModel(path, dtype, head=head or is_whole)
        model = self._stored.model
        modules = {"": model}
        if not is_whole:
            client, top = client_part(model, family, split), head_part(model, family) if head else None
            modules = {f"{family.decoder}.": client.decoder} | ({"": top.causal_lm} if top else {})
        tensors = {
            id(tensor): prefix + name
            for prefix, module in modules.items()
            for name, tensor in module.state_dict(keep_vars=True).items()
        }
        self.names = list(filter(self._stored.holds, tensors.values()))

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Some of them with their values in the dtype of the run, one after another."""
        yield from self._stored.tensors(names)


def _materialise(modules: Mapping[str, PreTrainedModel], stored: StoredModel, place: Place) -> None:
    """Give the tensors of ``modules`` their values; a tensor is called the module's key + its name there."""
    tied: dict[int, list[tuple[str, nn.Module, str]]] = {}  # name, owner and attribute of one and the same tensor
    for prefix, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            path, _, attribute = name.rpartition(".")
            tied.setdefault(id(tensor), []).append((prefix + name, module.get_submodule(path), attribute))
    by_first_name = {places[0][0]: places for places in tied.values()}
    for name, tensor in stored.tensors(by_first_name):
        tensor = tensor.to(place(name))
        _, owner, attribute = by_first_name[name][0]
        if isinstance(owner, QuantisedLinear) and attribute == "weight":
            owner.load(tensor)
            continue
        is_weight = isinstance(getattr(owner, attribute), nn.Parameter)
        value = nn.Parameter(tensor, requires_grad=False) if is_weight else tensor
        for _, owner, attribute in by_first_name[name]:
            setattr(owner, attribute, value)
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers(remove_duplicate=False):  # most are computed, and in no file
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, buffer.to(place(prefix + name)))
