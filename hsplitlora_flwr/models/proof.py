"""Which family a model belongs to, and the proof that a model that nobody registered can be cut.

The layout of an unregistered model is read off a tiny random model of the same class. That model is then cut at every
block, in two and in three, with something like an adapter on every linear layer, and must give the unsplit loss and
gradients; otherwise the model is refused. It is never silently wrong.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.models.build import build_causal_lm
from hsplitlora_flwr.models.families import FAMILIES, Family, UnsupportedModelError, list_families, tiny_config
from hsplitlora_flwr.models.parts import ModelPart
from hsplitlora_flwr.models.split import body_part, client_part, head_part, server_part, whole_model

log = logging.getLogger(__name__)

_proven: dict[str, Family | str] = {}
"""By architecture: the layout, or why there is none."""


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model, registered or proven.

    Parameters
    ----------
    config : PretrainedConfig
        The model's configuration; no weights are needed.

    Raises
    ------
    UnsupportedModelError
        If the model type is not registered and a tiny model of its class does not survive being cut.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    key = _architecture(config)
    if key not in _proven:
        try:
            _proven[key] = _prove_unregistered(config)
        except UnsupportedModelError as error:
            _proven[key] = str(error)
    found = _proven[key]
    if isinstance(found, Family):
        return found
    known = "; ".join(f"{name} ({', '.join(types)})" for name, types in list_families().items())
    raise UnsupportedModelError(
        f"model type '{config.model_type}' cannot be split: {found}. Known families: {known}; "
        "others are used where a tiny model of theirs proves itself"
    )


def _architecture(config: PretrainedConfig) -> str:
    """What decides whether a model can be cut: its configuration but for where it came from."""
    fields = config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"):
        fields.pop(name, None)
    return repr(sorted(fields.items()))


@torch.enable_grad()
def _prove_unregistered(config: PretrainedConfig) -> Family:
    _check_decoder(config)
    tiny = _tiny_model(config)
    if not _is_causal(tiny):
        raise UnsupportedModelError("a token changes what the model says of earlier ones, as in an encoder like BERT")
    family = _read_layout(tiny, config.model_type)
    try:
        family = dataclasses.replace(family, unadapted=find_unadapted(tiny, family), alike=False)
        prove(tiny, family)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a foreign architecture throws
        raise UnsupportedModelError(f"its code does not run on a part of its blocks ({brief(error)})") from error
    log.info(
        "model type '%s' is not registered; a tiny model of it, cut at every block, equals the whole", config.model_type
    )
    return family


def _check_decoder(config: PretrainedConfig) -> None:
    """See that a configuration is one of a decoder, before anything is built."""
    if config.is_encoder_decoder:
        raise UnsupportedModelError("it has an encoder and a decoder; name a model that is a decoder alone")
    if isinstance(getattr(config, "text_config", None), PretrainedConfig):
        raise UnsupportedModelError("it is multimodal; name its folder, from which its text decoder alone is loaded")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError("transformers has no causal language model of this type")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if not hasattr(type(config), name) and not hasattr(config, name)]:
        raise UnsupportedModelError(
            f"its configuration has no {' and no '.join(missing)}; only transformers are cut, no recurrent models "
            "such as Mamba or RWKV"
        )


def _tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """A tiny random model of the same class, in float64."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny = build_causal_lm(tiny_config(config), torch.float64)
            tiny.requires_grad_(False).eval()
            for parameter in tiny.parameters():  # norms start at one and biases at zero, which would hide mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        tiny(input_ids=torch.arange(8)[None], use_cache=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"no tiny model of it runs in float64, so whether it can be cut was not found out ({brief(error)})"
        ) from error
    return tiny


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether what a model says of a position depends on no later token."""
    input_ids = torch.arange(3, 12)[None]
    other = input_ids.clone()
    other[0, -1] = 50
    with torch.no_grad():
        logits, others = (model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (input_ids, other))
    return torch.allclose(logits, others, rtol=0, atol=1e-9)


def _read_layout(model: PreTrainedModel, model_type: str) -> Family:
    """Read the names off a tiny model by watching in which order the decoder's children run."""
    length = model.config.num_hidden_layers
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == length]
    if not lists:
        raise UnsupportedModelError(f"its {length} blocks are not in one list, or run more than once")
    decoder_name, _, blocks = min(lists, key=lambda name: name.count(".")).rpartition(".")
    decoder = model.get_submodule(decoder_name)
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModelError("its embeddings do not lie beside its blocks in one decoder")
    order: list[str] = []
    hooks = [
        child.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, child in [*decoder.named_children(), (blocks, decoder.get_submodule(blocks)[0])]  # type: ignore[index]
    ]
    model(input_ids=torch.arange(8)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    if blocks not in order:
        raise UnsupportedModelError(f"its blocks are not run from '{decoder_name}'")
    start = order.index(blocks)
    before = set(order[:start])
    weighty = [name for name in order[:start] if any(True for _ in decoder.get_submodule(name).parameters())]
    final = [name for name in order[start:] if name != blocks and name not in before]  # a norm may have no weights
    return Family(
        model_type,
        (model_type,),
        decoder_name,
        blocks,
        tuple(dict.fromkeys(weighty)),
        tuple(dict.fromkeys(final)),
    )


def prove(model: PreTrainedModel, family: Family) -> None:
    """Cut a model at every block, in two and in three, and compare the loss and the gradients with the whole's.

    Every linear layer of the parts has a term beside its weight, as an adapter puts one there; in the whole model the
    same terms are added to the weights.

    Parameters
    ----------
    model : PreTrainedModel
        A small causal LM in float64 without dropout.
    family : Family
        The layout to be proven.

    Raises
    ------
    UnsupportedModelError
        If a loss, or the gradient of a weight that is a matrix, differs by more than 1e-9.
    """
    batch = _batch(model)
    input_ids, attention_mask, labels = batch
    terms = _terms(whole_model(model, family))
    weights = [p for p in model.parameters() if p.ndim == 2]
    with _merged(model, terms):
        for weight in weights:
            weight.requires_grad_(True)
        loss = _loss(model, *batch)
        expected = torch.autograd.grad(loss, weights, allow_unused=True)

    for split in range(1, model.config.num_hidden_layers):
        client, server = client_part(model, family, split), server_part(model, family, split)
        body, head = body_part(model, family, split), head_part(model, family)
        for part in (client, server, body):
            _adapt(part, terms)
        for weight in weights:  # the parts share the model's tensors
            weight.requires_grad_(True)
        cut = client(input_ids, attention_mask)
        if cut.ndim != 3:
            raise UnsupportedModelError(
                f"its blocks hand on tensors of shape {tuple(cut.shape)}, not a vector per token"
            )
        for parts, split_loss in (
            ("in two", server(cut, attention_mask, labels).loss),
            ("in three", head(body(cut, attention_mask), labels).loss),
        ):
            where = f"cut {parts} after block {split}"
            if not torch.allclose(split_loss, loss, rtol=0, atol=1e-9):
                raise UnsupportedModelError(
                    f"{where}, its loss is {split_loss:.9f}, not {loss:.9f}: its code does something around the blocks "
                    "that a part of them cannot leave out, such as scaling the embeddings or adding positions to them; "
                    "name a model of another type"
                )
            got = torch.autograd.grad(split_loss, weights, retain_graph=True, allow_unused=True)
            if not all(map(_equal, got, expected)):
                raise UnsupportedModelError(f"{where}, its gradients differ from the whole's")
    model.requires_grad_(False)


def find_unadapted(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """Linear layers, by their name inside a block, that take no adapter.

    Code that looks at a layer's weight and does not call it passes an adapter by, perhaps where it trains alone, and a
    router that is a kind of linear layer may return more than a product.

    Parameters
    ----------
    model : PreTrainedModel
        As for :func:`prove`, in evaluation mode.
    family : Family
        Its layout.
    """
    found = _passed_by(model, family)
    model.train()
    if torch.equal(_loss(model, *_batch(model)), _loss(model, *_batch(model))):  # else dice are thrown
        found = tuple(dict.fromkeys((*found, *_passed_by(model, family))))
    model.eval()
    return found


def _passed_by(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """The same in the mode, of training or evaluation, that the model is in."""
    whole = whole_model(model, family)
    terms = _terms(whole)
    inside = {name: name.removeprefix(f"{family.decoder}.{family.blocks}.").partition(".")[2] for name in terms}
    if _adapts(model, family, terms):
        return ()
    return tuple(
        place
        for place in dict.fromkeys(inside.values())
        if not _adapts(model, family, {name: term for name, term in terms.items() if inside[name] == place})
    )


def _adapts(model: PreTrainedModel, family: Family, terms: Mapping[str, Tensor]) -> bool:
    """Whether terms beside the weights of some layers do what they do when they are added to the weights."""
    batch = _batch(model)
    with torch.no_grad(), _merged(model, terms):
        expected = _loss(model, *batch)
    whole = whole_model(model, family)
    _adapt(whole, terms)
    try:
        with torch.no_grad():
            return torch.allclose(whole(*batch).loss, expected, rtol=0, atol=1e-9)
    except Exception:  # the layer is not used as one that maps a tensor to a tensor
        return False


class _Adapted(nn.Module):
    """A linear layer with a matrix ``(out, in)`` beside its weight."""

    is_adapted_linear = True

    def __init__(self, base: nn.Module, term: Tensor) -> None:
        super().__init__()
        self.base, self.term = base, term

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y: Tensor = self.base(rows) + nn.functional.linear(rows, self.term)
        return y.view(*x.shape[:-1], y.shape[-1])


def _terms(part: ModelPart) -> dict[str, Tensor]:
    """A matrix ``(out, in)`` for every linear layer."""
    generator, terms = torch.Generator().manual_seed(1), {}
    for name, linear in part.linears():
        weight = linear.weight
        assert isinstance(weight, Tensor)
        shape = weight.T.shape if isinstance(linear, Conv1D) else weight.shape
        terms[name] = 0.02 * torch.randn(shape, dtype=weight.dtype, generator=generator)
    return terms


def _adapt(part: ModelPart, terms: Mapping[str, Tensor]) -> None:
    for name, linear in list(part.linears()):
        if name in terms:
            part.replace(name, _Adapted(linear, terms[name]))


@contextmanager
def _merged(model: PreTrainedModel, terms: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the terms are part of the weights."""
    before = {}
    for name, term in terms.items():
        linear = model.get_submodule(name)
        assert isinstance(linear.weight, Tensor)
        before[name] = linear.weight.detach().clone()
        linear.weight.data += term.T if isinstance(linear, Conv1D) else term
    try:
        yield
    finally:
        for name, weight in before.items():
            model.get_parameter(f"{name}.weight").data.copy_(weight)


def _batch(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, int64, ``(2, 9)``: one row is padded, and prompts have no labels."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100
    return input_ids, attention_mask, labels


def _loss(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The loss of the whole model, from its logits."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _equal(got: Tensor | None, wanted: Tensor | None) -> bool:
    if got is None or wanted is None:
        return got is wanted
    return torch.allclose(got, wanted, rtol=0, atol=1e-9)


def brief(error: Exception) -> str:
    """The kind of an error and the start of its text, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200].removesuffix(": ")
