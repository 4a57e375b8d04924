"""A model without memory for its weights, and the tensors that its files hold for it.

Files are read through transformers' own conversion, one tensor at a time. Safetensors files are memory-mapped, so what
belongs to the other side never enters the process.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.checkpoint import Checkpoint, ModelFilesError
from hsplitlora_flwr.models.configuration import read_config, read_stored_config, tied_parts
from hsplitlora_flwr.models.conversion import (
    Conversion,
    PackedWeightsError,
    Recipe,
    find_dequantiser,
    take_quantisation,
)
from hsplitlora_flwr.models.multimodal import (
    is_multimodal,
    name_in_whole,
    names_in_whole,
    stands_alone,
    text_config,
    whole_model_of,
)
from hsplitlora_flwr.models.proof import brief, find_family
from hsplitlora_flwr.models.quantisation import quantise_linears

log = logging.getLogger(__name__)

_NAMED = 4
"""Tensors that a message names before it only counts."""
_UNPACKED = "name the checkpoint that it was made from; model.quantise=8bit or 4bit quantises that while it loads"


def read_settled_config(path: str) -> PretrainedConfig:
    """:func:`read_config`, with ``tie_word_embeddings`` as it turns out when the weights that are here are loaded.

    Raises
    ------
    ModelFilesError
        As for :func:`read_config`; weights that are not here, or cannot be read, change nothing.
    """
    config = read_config(path)
    if tied_parts(config):
        try:
            return StoredModel(path, fetch=False).config
        except ModelFilesError:
            pass  # a plan needs no weights, and the check says what is wrong with them
    return config


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


class StoredModel:
    """A model without memory, and the tensors that transformers would load for it, by name.

    Parameters
    ----------
    path, dtype, quantise : str
        As for :func:`load_causal_lm`.
    head : bool
        Whether a head is wanted. If the configuration ties it to the embeddings and the files hold both, they are
        compared: if they differ they are two tensors, as in transformers, and the configuration no longer ties them.
    fetch : bool
        As for :class:`~hsplitlora_flwr.models.checkpoint.Checkpoint`.

    Attributes
    ----------
    config : PretrainedConfig
        The model's.
    model : PreTrainedModel
        All of it; see :func:`empty_model`.
    inside : dict[str, str]
        Of the text decoder of a multimodal model: the names of its parts in the whole model, from
        :func:`~hsplitlora_flwr.models.multimodal.names_in_whole`. Empty for other models.

    Raises
    ------
    ModelFilesError
        If there are no weights, or if they are quantised and cannot be dequantised.
    """

    def __init__(
        self, path: str, dtype: str = "float32", quantise: str = "none", *, head: bool = True, fetch: bool = True
    ) -> None:
        stored = read_stored_config(path)
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
            for part in tied_parts(self.config):
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
        """The name of a tensor in the files: its own, or that of a tensor that it is tied to."""
        source = self._tied.get(name, name)
        twins = (name, source, *(target for target, other in self._tied.items() if other == source))
        return next((twin for twin in twins if twin in self._recipes), name)

    def _is_one(self, name: str, other: str) -> bool:
        """Whether two tied tensors are one: the files hold only one of them, or the same numbers twice."""
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
