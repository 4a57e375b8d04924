"""The update on disk: a checkpoint of it, a PEFT adapter, and the model with the update merged in.

A PEFT adapter can hold the accumulated update exactly, whatever its rank: each layer becomes an adapter of just the
rank that its update has, through ``rank_pattern`` and ``alpha_pattern``, with ``alpha = rank`` so that PEFT's scale is
1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hsplitlora_flwr.lora.layers import shape_of
from hsplitlora_flwr.lora.update import AccumulatedUpdate, Change, Patch, UpdateError, digest, recompress
from hsplitlora_flwr.models.checkpoint import local_path
from hsplitlora_flwr.models.multimodal import name_in_whole
from hsplitlora_flwr.models.parts import is_linear
from hsplitlora_flwr.models.quantisation import QuantisedLinear

DELTA_FILE = "delta.safetensors"
ADAPTER_FILE, MANIFEST_FILE = "adapter_model.safetensors", "manifest.json"
_ADVICE = "restore the file from a copy, or start without it"
TOLERANCE = 1e-6
"""Relative error, in the Frobenius norm, with which an exported adapter equals the accumulated update."""


def save_peft_adapter(
    changes: Mapping[str, Change],
    folder: Path | str,
    model: PreTrainedModel,
    base_name: str = "",
    inside: Mapping[str, str] | None = None,
) -> None:
    """Write the accumulated update as a PEFT LoRA adapter.

    Parameters
    ----------
    changes : Mapping[str, Change]
        The update by absolute layer name.
    folder : Path or str
        Where ``adapter_config.json`` and ``adapter_model.safetensors`` go; it is created.
    model : PreTrainedModel
        The base model (its weights are not read): it tells which layers are GPT-2's Conv1D.
    base_name : str
        What the adapter names as its base model: as of ``model.path``. A folder is named with its whole path, the
        demonstration model by where it lies, so that ``AutoPeftModelForCausalLM`` finds it from anywhere.
    inside : Mapping[str, str], optional
        For an adapter over a multimodal model whose text decoder ``model`` is: how parts of it are called there, as
        :class:`~hsplitlora_flwr.models.stored.StoredModel` knows.
    """
    from peft import LoraConfig  # takes seconds to import, and a client never gets here

    factors = {name: _factors(change) for name, change in changes.items()}
    factors = {name: (b, a) for name, (b, a) in factors.items() if b.shape[1]}
    if not factors:  # an update of zero: PEFT needs one layer, and a zero adapter on it says the same
        name = next(name for name, module in model.named_modules() if is_linear(module))
        rows, columns = shape_of(model.get_submodule(name))
        factors = {name: (torch.zeros(rows, 1), torch.zeros(1, columns))}
    transposed = any(_is_conv1d(model.get_submodule(name)) for name in factors)
    factors = {name_in_whole(name, inside or {}): pair for name, pair in factors.items()}
    ranks = {name: b.shape[1] for name, (b, _) in factors.items()}
    default = max(ranks.values())
    # PEFT reads the keys of a pattern as regular expressions that end a layer's name.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != default}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=_findable(base_name),
        r=default,
        lora_alpha=default,
        target_modules=sorted(factors),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_peft_adapter(
    folder: Path, model: PreTrainedModel, inside: Mapping[str, str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Read what :func:`save_peft_adapter` wrote.

    Parameters
    ----------
    folder : Path
    model, inside
        As they were written with; the weights of ``model`` are not read.

    Returns
    -------
    dict[str, tuple[Tensor, Tensor]]
        ``(B, A)`` by absolute layer name of ``model``, ``(out, r)`` and ``(r, in)``; their product is the update.

    Raises
    ------
    UpdateError
        If the file is damaged, or is of another model.
    """
    file = folder / ADAPTER_FILE
    own = {name_in_whole(name, inside or {}): name for name, part in model.named_modules() if is_linear(part)}
    with _reading(file):
        tensors = load_file(file)
    layers = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    if strange := sorted(layers - set(own)):
        raise UpdateError(
            f"{file} has the layer '{strange[0]}', which the model has not; name the base it was made for"
        )
    with _reading(file):
        pairs = {
            own[name]: tuple(tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "BA") for name in layers
        }
    for name, (b, a) in pairs.items():
        if (b.shape[0], a.shape[1]) != shape_of(model.get_submodule(name)) or b.shape[1] != a.shape[0]:
            raise UpdateError(
                f"{file}: the shapes of layer '{name}' are not the model's; name the base it was made for"
            )
    return {name: (b, a) for name, (b, a) in sorted(pairs.items())}


def write_manifest(folder: Path, rounds: Iterable[Mapping[str, Any]] = ()) -> None:
    """Write ``manifest.json`` beside an adapter: what each layer's update is, and what came of each round.

    Of every layer: rank, shape ``(out, in)``, Frobenius norm of the update, and SHA-256 of its two tensors as they
    stand in the file, ``B`` first. Of every file: its SHA-256.

    Parameters
    ----------
    folder : Path
        What :func:`save_peft_adapter` wrote.
    rounds : Iterable[Mapping]
        As ``summary.json`` has them; number, norm of the update and perplexity are taken over.
    """
    layers = {}
    with safe_open(folder / ADAPTER_FILE, framework="pt") as stored:
        keys = sorted(stored.keys())
        for key in (key for key in keys if key.endswith(".lora_A.weight")):
            name = key.removesuffix(".lora_A.weight")
            b, a = stored.get_tensor(f"{name}.lora_B.weight"), stored.get_tensor(key)
            square = ((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum().clamp(min=0)
            layers[name.removeprefix("base_model.model.")] = {
                "rank": a.shape[0],
                "shape": [b.shape[0], a.shape[1]],
                "norm": float(square.sqrt()),
                "sha256": sha256(b.contiguous().numpy().tobytes() + a.contiguous().numpy().tobytes()).hexdigest(),
            }
    files = {name: sha256((folder / name).read_bytes()).hexdigest() for name in (ADAPTER_FILE, "adapter_config.json")}
    told = [{key: row.get(key) for key in ("round", "update_norm", "perplexity")} for row in rounds]
    content = {"files": files, "rounds": told, "layers": layers}
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def at_rank(changes: Mapping[str, Change], rank: int) -> tuple[Mapping[str, Change], float]:
    """The best approximation of every layer's change of at most this rank.

    Returns
    -------
    tuple[Mapping[str, Change], float]
        The changes, and what they lost: a share of the sum of squared Frobenius norms.
    """
    smaller = AccumulatedUpdate(rank)
    smaller.add({name: _factors(change) for name, change in changes.items()})
    return smaller.changes(), smaller.dropped


def _findable(base: str) -> str:
    """The name of a base by which stock PEFT finds it from any folder."""
    path = local_path(base)
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().is_dir() else path


def _is_conv1d(linear: torch.nn.Module) -> bool:
    return isinstance(linear, Conv1D) or (isinstance(linear, QuantisedLinear) and linear.transposed)


def _factors(change: Change) -> tuple[Tensor, Tensor]:
    """A pair ``(B, A)``, fp32, with the product ``change``."""
    if change.factors is not None:
        return change.factors
    assert change.matrix is not None
    rows, columns = change.matrix.shape
    if rows <= columns:
        return recompress(torch.eye(rows), change.matrix)
    return recompress(change.matrix, torch.eye(columns))


def save_update(accumulated: AccumulatedUpdate, folder: Path) -> None:
    """Write the accumulated update as ``delta.safetensors``, in one piece; :func:`load_update` reads it.

    A change has the keys ``layer:B`` and ``layer:A``, or ``layer:dense``. The metadata hold the version, the states of
    the layers and a checksum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{DELTA_FILE}.part"
    tensors, text = accumulated.since({}).pack()
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    parts = [(key, tensors[key]) for key in sorted(tensors)]
    save_file(tensors, draft, metadata={**text, "checksum": _checksum(text, parts)})
    draft.replace(folder / DELTA_FILE)


def load_update(folder: Path, rank_cap: int = 0, without: Collection[str] = ()) -> AccumulatedUpdate:
    """Read what :func:`save_update` wrote.

    The whole file is checked, one tensor at a time; in memory is no more than what is asked for.

    Parameters
    ----------
    folder : Path
        Where ``delta.safetensors`` is.
    rank_cap : int
        As for :class:`~hsplitlora_flwr.lora.update.AccumulatedUpdate`, for the rounds to come.
    without : Collection[str]
        Layers that are not wanted.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    UpdateError
        If the file is damaged.
    """
    file, kept = folder / DELTA_FILE, dict[str, Tensor]()
    text = _metadata(file)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with safe_open(file, framework="pt") as stored:
            keys = sorted(stored.keys())
        for key in keys:
            with safe_open(file, framework="pt") as stored:  # a mapping of its own: what was read leaves memory
                tensor = stored.get_tensor(key)
            if key.rpartition(":")[0] not in without:
                kept[key] = tensor.clone()
            yield key, tensor

    with _reading(file):
        if text.get("checksum") != _checksum({key: text[key] for key in text if key != "checksum"}, tensors()):
            raise UpdateError(f"{file} is damaged (its checksum does not fit its content); {_ADVICE}")
        states = {name: state for name, state in json.loads(text["states"]).items() if name not in without}
        accumulated = AccumulatedUpdate(rank_cap)
        accumulated.apply(Patch.unpack(kept, {**text, "states": json.dumps(states)}))
        return accumulated


def load_held(folder: Path) -> tuple[int, dict[str, str]]:
    """Version and states of what :func:`save_update` wrote, as they stand there; no tensor is read, and none checked.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    UpdateError
        If this much of it is damaged.
    """
    file = folder / DELTA_FILE
    text = _metadata(file)
    with _reading(file):
        return int(text["version"]), {name: str(end) for name, (_, end, _) in json.loads(text["states"]).items()}


def _metadata(file: Path) -> dict[str, str]:
    with _reading(file), safe_open(file, framework="pt") as stored:
        return dict(stored.metadata() or {})


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever a file makes its readers raise, other than that it is not there, it is damaged."""
    try:
        yield
    except (UpdateError, FileNotFoundError):
        raise
    except Exception as error:
        raise UpdateError(f"{file} is damaged ({str(error)[:200] or type(error).__name__}); {_ADVICE}") from error


def _checksum(text: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of a file's text and of its tensors in order of their keys."""
    pairs: Iterable[tuple[str, str | Tensor]] = chain(sorted(text.items()), tensors)
    return digest(part for pair in pairs for part in pair)


def save_merged_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a model whose weights hold the update, and its tokenizer, in Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers writes a class name here that its own AutoTokenizer does not accept
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2))
