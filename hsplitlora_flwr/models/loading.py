"""From files to a model, or to one part of it, without ever holding more than that part.

A model is first built without memory for its weights. The part that this side needs is cut out, and only its tensors
are read: safetensors files are memory-mapped, so bytes that belong to the other side never enter the process.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import torch
from accelerate import init_empty_weights
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights

from hsplitlora_flwr.config import DTYPES, Config
from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.checkpoint import ADAPTER_FILE, Checkpoint, ModelFilesError, local_path
from hsplitlora_flwr.models.conversion import (
    Conversion,
    PackedWeightsError,
    Recipe,
    find_dequantiser,
    parts_of,
    take_quantisation,
)
from hsplitlora_flwr.models.families import Family
from hsplitlora_flwr.models.multimodal import (
    is_multimodal,
    name_in_whole,
    names_in_whole,
    prove_text_decoder,
    stands_alone,
    text_config,
    whole_model_of,
)
from hsplitlora_flwr.models.placement import Place, follow, spread
from hsplitlora_flwr.models.proof import brief, find_family
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

log = logging.getLogger(__name__)

_HUB_SECONDS = 5.0
_NAMED = 4
"""Tensors that a message names before it only counts."""
_UNPACKED = "name the checkpoint that it was made from; model.quantise=8bit or 4bit quantises that while it loads"


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


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a model, without its weights; how they are quantised in files is left out.

    Of a multimodal model it is that of its text decoder.

    Raises
    ------
    ModelFilesError
        If ``path`` is neither a model folder nor a model of the hub that can be reached.
    UnsupportedModelError
        If the text decoder of a multimodal model is no causal LM of its own.
    """
    config = _full_config(path)
    take_quantisation(config)
    return text_config(config)


def _full_config(path: str) -> PretrainedConfig:
    folder = local_path(path)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        what = " but a PEFT adapter; merge it into its model" if (Path(folder) / ADAPTER_FILE).is_file() else ""
        raise ModelFilesError(
            f"model.path={path}: the folder holds no config.json{what}; name a folder in Hugging Face format"
        )
    away = "" if Path(folder).is_dir() else _hub_is_away(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=bool(away))
    except (OSError, ValueError, StrictDataclassError) as error:
        what = f"no folder of that name, and not readable as a hub name: {error}"
        if away:
            what = (
                f"no folder of that name, not among the models fetched before, and the hub cannot be reached ({away}); "
                "name a folder, or mend the connection (HF_ENDPOINT and https_proxy say where it goes)"
            )
        if Path(folder).is_dir():
            what = _wrong_config(Path(folder) / "config.json", error)
        raise ModelFilesError(f"model.path={path}: {what}") from error
    assert isinstance(config, PretrainedConfig)
    return config


@lru_cache(maxsize=8)
def _hub_is_away(name: str) -> str:
    """Why the hub cannot be asked for a model; "" if it answers, whatever it says.

    One question with a short wait: what fetches files asks six times, which takes most of a minute.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        pass  # an answer, or no name to ask for: what reads the configuration says it better
    except Exception as error:  # of whatever library asks
        return brief(error)
    return ""


def _wrong_config(file: Path, error: Exception) -> str:
    """What is wrong with a ``config.json`` that transformers does not take."""
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return f"its config.json is damaged ({brief(error)}); restore it from a copy"
    if not kind:
        return "its config.json names no model_type; name a folder of a causal language model in Hugging Face format"
    if kind not in CONFIG_MAPPING:
        return (
            f"its config.json names the model type '{kind}', which transformers {transformers_version} does not know; "
            "install a newer one, or name another model (code that comes with a model is not run)"
        )
    return f"its config.json is not one of a '{kind}': {brief(error)}"


def with_model_dtype(config: Config) -> Config:
    """The same settings with the dtype in which the base is held, where ``model.dtype=auto`` leaves that to the model.

    Raises
    ------
    ModelFilesError, UnsupportedModelError
        As for :func:`read_config`.
    """
    if config.model.dtype != "auto":
        return config
    stored = str(read_config(config.model.path).dtype).removeprefix("torch.")
    # float16 has too few exponents to train beside; float32 holds each of its numbers
    dtype = stored if stored in DTYPES else "float32"
    return replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]


def read_settled_config(path: str) -> PretrainedConfig:
    """:func:`read_config`, with ``tie_word_embeddings`` as it turns out when the weights that are here are loaded.

    Raises
    ------
    ModelFilesError
        As for :func:`read_config`; weights that are not here, or cannot be read, change nothing.
    """
    config = read_config(path)
    if _tied_parts(config):
        try:
            return StoredModel(path, fetch=False).config
        except ModelFilesError:
            pass  # a plan needs no weights, and the check says what is wrong with them
    return config


def check_model(path: str, split_min: int = 1, split_max: int = 0) -> Family:
    """Check, before anything is loaded, that a model has all its weights, can be cut, and allows the wanted splits.

    Tensors in the files that the model has no place for are logged.

    Raises
    ------
    ModelFilesError, SplitError, UnsupportedModelError
        With the value that is wrong and what to do.
    """
    config, stored = read_config(path), _full_config(path)
    Checkpoint(path)  # whether there are weights at all
    family = find_family(config)
    take_quantisation(stored)
    prove_text_decoder(stored)
    check_split(config, split_min)
    if split_max:
        check_split(config, split_max)
    StoredModel(path).check()
    return family


def empty_model(
    config: PretrainedConfig, dtype: str = "float32", quantise: str = "none", experts: str | None = None
) -> PreTrainedModel:
    """A causal LM whose parameters have shapes but no memory; its buffers are real, as they are before any is read.

    With ``quantise`` the linear layers of its blocks quantise what they load; ``experts`` is that of
    :func:`~hsplitlora_flwr.models.build.build_causal_lm`.

    Raises
    ------
    ModelFilesError
        If its class makes no model of the configuration.
    """
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = build_causal_lm(config, getattr(torch, dtype), experts)
    except Exception as error:  # each class has its own for a value that it does not know
        raise ModelFilesError(
            f"no '{config.model_type}' can be made as its config.json says ({brief(error)}); correct that value, or "
            "restore the file from a copy"
        ) from error
    _keep_in_fp32(model)
    _compute_buffers(model)
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


class StoredModel:
    """A model without memory, and what files hold for it: the tensors that transformers would load, by their names.

    Parameters
    ----------
    path, dtype, quantise : str
        As for :func:`load_causal_lm`.
    head : bool
        Whether a head is wanted. Where it is to be tied to the embeddings, and files hold both, they are compared: if
        they differ they are two tensors, as in transformers, and the configuration no longer ties them.
    fetch : bool
        As for :class:`~hsplitlora_flwr.models.checkpoint.Checkpoint`.

    Attributes
    ----------
    config : PretrainedConfig
        The model's.
    model : PreTrainedModel
        All of it; see :func:`empty_model`.
    inside : dict[str, str]
        Where transformers loads all of a multimodal model of which this is the text decoder: how parts of it are called
        there, as of :func:`~hsplitlora_flwr.models.multimodal.names_in_whole`. Empty otherwise.

    Raises
    ------
    ModelFilesError
        If there are no weights, or if they are quantised and cannot be dequantised.
    """

    def __init__(
        self, path: str, dtype: str = "float32", quantise: str = "none", *, head: bool = True, fetch: bool = True
    ) -> None:
        stored = _full_config(path)
        quantisation = take_quantisation(stored)
        self.config = text_config(stored)
        self._files = Checkpoint(path, fetch=fetch)
        try:
            dequantiser = find_dequantiser(quantisation) if quantisation else None
        except PackedWeightsError as error:
            raise self._error(f"{error}; {_UNPACKED}") from error
        self.model = empty_model(self.config, dtype, quantise)
        self._state = self.model.state_dict()
        self._whole, self.inside = self.model, dict[str, str]()
        if is_multimodal(stored) and not stands_alone(stored):
            self._whole = whole_model_of(stored, self.config, dtype)
            self.inside = names_in_whole(self._whole, self.model, find_family(self.config))
        self._own = {name_in_whole(name, self.inside): name for name in self._state}
        self._conversion = Conversion(self._whole, self._files.names, dequantiser)
        recipes = self._conversion.recipes
        self._recipes = {own: recipes[name] for name, own in self._own.items() if name in recipes}
        self._tied = self.model.get_expanded_tied_weights_keys(all_submodels=True)
        if head and not all(map(self._is_one, self._tied, self._tied.values())):
            log.info("model.path=%s: the files hold a head of their own, so it is not tied to the embeddings", path)
            for part in _tied_parts(self.config):
                part.tie_word_embeddings = False
            self.model, self._tied = empty_model(self.config, dtype, quantise), {}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors called ``names``, in the dtypes of the model, one after another.

        Buffers that a checkpoint need not hold are passed over where it does not.

        Raises
        ------
        ModelFilesError
            If one is missing, damaged, or does not fit the model.
        """
        by_recipe: dict[int, list[str]] = {}
        for name in names:
            if recipe := self._recipe(name):
                by_recipe.setdefault(id(recipe), []).append(name)
        for together in by_recipe.values():
            recipe = self._recipe(together[0])
            assert recipe is not None
            made = self._made(recipe)
            for name in together:
                yield name, made[self._stored_as(name)].to(self._state[name].dtype)
            del made

    def tensor(self, name: str) -> Tensor:
        """One tensor; as for :meth:`tensors`."""
        return next(self.tensors([name]))[1]

    def holds(self, name: str) -> bool:
        """Whether a tensor is to be read, not one that files may leave out, and do; errors as for :meth:`tensors`."""
        return self._recipe(name) is not None

    def check(self) -> None:
        """Check that files hold every tensor of the model, in its shape, and log what they hold besides.

        Raises
        ------
        ModelFilesError
            If they do not.
        """
        recipes = {id(recipe): recipe for recipe in map(self._recipe, self._state) if recipe}
        outlines = self._files.outlines()
        for recipe in recipes.values():
            self._make(recipe, {name: outlines[name] for name in recipe.stored})
        if unread := self._unread():
            log.warning("model.path=%s: the model has no place for, and ignores, %s", self._files.path, _list(unread))

    def _recipe(self, name: str) -> Recipe | None:
        """What makes a tensor, or one that it is tied to; None for a buffer that files may leave out, and do."""
        if recipe := self._recipes.get(self._stored_as(name)):
            return recipe
        # What files may leave out, and below hold besides, a class says for `from_pretrained` alone, which reads whole
        # models: nothing public says it.
        if not self._state[name].is_meta and _matches(name, self.model._keys_to_ignore_on_load_missing):
            return None
        is_head = self.model.get_submodule(name.rpartition(".")[0]) is self.model.get_output_embeddings()
        advice = "; if the embeddings are its head, write tie_word_embeddings=true into config.json" if is_head else ""
        raise self._error(f"the weights hold no tensor '{name}'{advice}")

    def _stored_as(self, name: str) -> str:
        """The name under which files hold a tensor: its own, or that of one that it is tied to."""
        source = self._tied.get(name, name)
        twins = (name, source, *(target for target, other in self._tied.items() if other == source))
        return next((twin for twin in twins if twin in self._recipes), name)

    def _is_one(self, name: str, other: str) -> bool:
        """Whether two tensors are one, in that files do not hold both, or hold the same numbers twice."""
        if not {name, other} <= self._recipes.keys():
            return True
        one, two = (self._made(self._recipes[key])[key] for key in (name, other))
        exact = torch.promote_types(one.dtype, two.dtype)
        return torch.equal(one.to(exact), two.to(exact))

    def _made(self, recipe: Recipe) -> dict[str, Tensor]:
        """The tensors of a recipe by their names in the model, as they are stored."""
        return self._make(recipe, dict(self._files.tensors(recipe.stored)))

    def _make(self, recipe: Recipe, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of tensors that may be mere outlines."""
        try:
            made = recipe.make(tensors, self._whole)
        except PackedWeightsError as error:
            raise self._error(f"{error}; {_UNPACKED}") from error
        except Exception as error:  # each operation of transformers throws its own
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise self._error(f"'{recipe.targets[0]}' cannot be made of {_list(recipe.stored)}: {why}") from error
        own = {self._own[name]: made[name] for name in recipe.targets if name in self._own}
        for name, tensor in own.items():
            shape, wanted = tuple(tensor.shape), tuple(self._state[name].shape)
            if shape != wanted:
                raise self._error(f"'{name}' has shape {shape}, the configuration says {wanted}")
        return own

    def _unread(self) -> list[str]:
        """Names in files that mean nothing to the model, and that it does not compute itself."""
        computed = {tuple(name.split(".")[-2:]) for name, _ in self.model.named_buffers()}
        return [
            name
            for name in self._conversion.unread
            if tuple(name.split(".")[-2:]) not in computed
            and not _matches(name, self.model._keys_to_ignore_on_load_unexpected)
        ]

    def _error(self, text: str) -> ModelFilesError:
        return ModelFilesError(f"model.path={self._files.path}: {text}")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _tied_parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration, and those inside it, that tie a head to embeddings."""
    return [part for part in parts_of(config) if getattr(part, "tie_word_embeddings", False)]


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute buffers again, in fp32 before they are rounded to the dtype of the base, as transformers does."""
    for parameter in model.parameters():  # has no memory: transformers passes by what it finds marked as read already
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.init_weights()  # which ties weights as well


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Give those tensors fp32 that must have it, whatever the others have: biases of routers, for instance."""
    # `from_pretrained` goes by this while it reads weights, and nothing public says it of a model that is not read yet.
    patterns = model._keep_in_fp32_modules_strict
    if model.dtype not in (torch.float16, torch.bfloat16) or not patterns:
        return
    for name, tensor in model.state_dict(keep_vars=True).items():
        if _matches(name, patterns):
            owner, _, attribute = name.rpartition(".")
            exact = tensor.detach().to(torch.float32)
            is_weight = isinstance(tensor, nn.Parameter)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(exact) if is_weight else exact)


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
