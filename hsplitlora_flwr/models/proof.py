"""Which family a model belongs to, and the proof that a model that nobody registered can be cut.

The layout of an unregistered model is read off a tiny random model of the same class. That model is then cut at every
block, in two and in three, and must give the unsplit loss and gradients; otherwise the model is refused. It is never
silently wrong.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hsplitlora_flwr.models.families import FAMILIES, Family, UnsupportedModelError, list_families, tiny_config
from hsplitlora_flwr.models.split import body_part, client_part, head_part, server_part

log = logging.getLogger(__name__)

_proven: dict[str, Family] = {}


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
    if config.model_type not in _proven:
        _proven[config.model_type] = _prove_unregistered(config.model_type, config)
    return _proven[config.model_type]


def _prove_unregistered(model_type: str, config: PretrainedConfig) -> Family:
    known = "; ".join(f"{name} ({', '.join(types)})" for name, types in list_families().items())
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tiny = AutoModelForCausalLM.from_config(tiny_config(config)).double().eval()
        family = _read_layout(tiny, model_type)
        prove(tiny, family)
    except Exception as error:  # whatever a foreign architecture throws, the answer is the same
        raise UnsupportedModelError(
            f"model type '{model_type}' is not a registered family and did not prove itself: {error}. "
            f"Known families: {known}"
        ) from error
    log.info("model type '%s' is not registered; a tiny model of it, cut at every block, equals the whole", model_type)
    return family


def _read_layout(model: PreTrainedModel, model_type: str) -> Family:
    """Read the names off a tiny model by watching in which order the decoder's children run."""
    length = model.config.num_hidden_layers
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == length]
    if not lists:
        raise UnsupportedModelError(f"it has no list of {length} blocks")
    decoder_name, _, blocks = min(lists, key=lambda name: name.count(".")).rpartition(".")
    decoder = model.get_submodule(decoder_name)
    order: list[str] = []
    hooks = [
        child.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, child in [*decoder.named_children(), (blocks, decoder.get_submodule(blocks)[0])]  # type: ignore[index]
    ]
    model(input_ids=torch.arange(8)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    start = order.index(blocks)
    weighty = [name for name in order if name != blocks and any(True for _ in decoder.get_submodule(name).parameters())]
    embeddings = tuple(name for name in weighty if order.index(name) < start)
    return Family(
        model_type, (model_type,), decoder_name, blocks, embeddings, tuple(n for n in weighty if n not in embeddings)
    )


def prove(model: PreTrainedModel, family: Family) -> None:
    """Cut a model at every block, in two and in three, and compare the loss and the gradients with the whole's.

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
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100

    weights = [p for p in model.parameters() if p.ndim == 2]
    for weight in weights:
        weight.requires_grad_(True)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = torch.autograd.grad(loss, weights, allow_unused=True)

    for split in range(1, model.config.num_hidden_layers):
        client, server = client_part(model, family, split), server_part(model, family, split)
        body, head = body_part(model, family, split), head_part(model, family)
        for weight in weights:  # the parts share the model's tensors
            weight.requires_grad_(True)
        cut = client(input_ids, attention_mask)
        for parts, split_loss in (
            ("in two", server(cut, attention_mask, labels).loss),
            ("in three", head(body(cut, attention_mask), labels).loss),
        ):
            where = f"cut {parts} after block {split}"
            if not torch.allclose(split_loss, loss, rtol=0, atol=1e-9):
                raise UnsupportedModelError(f"{where}, its loss is {split_loss:.9f}, not {loss:.9f}")
            got = torch.autograd.grad(split_loss, weights, retain_graph=True, allow_unused=True)
            if not all(map(_equal, got, expected)):
                raise UnsupportedModelError(f"{where}, its gradients differ from the whole's")
    model.requires_grad_(False)


def _equal(got: Tensor | None, wanted: Tensor | None) -> bool:
    if got is None or wanted is None:
        return got is wanted
    return torch.allclose(got, wanted, rtol=0, atol=1e-9)
