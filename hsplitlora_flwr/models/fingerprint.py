"""Whether two machines hold the same base: a client that trains on another one trains something else.

Adapters of clients whose bases differ can be added up without an error, and mean nothing. So the server says what its
base is, and a client compares before it trains: the configuration and the tokenizer before it is planned for, and the
tensors of its own part before each task. Nobody reads a tensor for that which it does not hold.

What counts is what both sides compute with, not how it is stored: the folder may be another, and so may the dtype of
the files, as long as the weights are the same in ``model.dtype``. Settings that one side alone knows, as another
version of transformers writes them, are not compared. The digests of tensors are kept in the user's cache, by the
names, sizes and times of the files, so they are computed once.

This is for mistakes. A client that means to train another base can say what it likes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import platformdirs
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from hsplitlora_flwr.models.checkpoint import local_path
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.loading import PartTensors, load_tokenizer

_PROBE = "The mayor's cat—sat  on\tit.\nÜber 1,234.5 naïve 東京 🙂 def f(x): return x**2  <s> [INST]"
"""A text that tokenizers take apart in different ways."""
_UNSAID = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Settings of a configuration that change nothing of what is computed in ``model.dtype``."""
_CHUNK = 1 << 22
"""Entries of a tensor that are converted at a time."""
_KEPT = 100
"""Files of digests in the cache; the oldest go."""


class BaseMismatchError(ValueError):
    """A node holds another base than the server; the text says what differs, with both values."""


@dataclass(frozen=True)
class Fingerprint:
    """What a base is, but for its tensors.

    Parameters
    ----------
    config : Mapping[str, Any]
        Settings of its configuration, as JSON has them.
    tokens : int
        Size of the tokenizer's vocabulary.
    vocabulary, encoding : str
        Digests of the vocabulary, and of how the tokenizer takes a text apart.
    special : str
        The special tokens by their roles.
    """

    config: Mapping[str, Any]
    tokens: int
    vocabulary: str
    encoding: str
    special: str

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Fingerprint:
        """The inverse of :meth:`to_text`."""
        return cls(**json.loads(text))

    def check(self, other: Fingerprint, path: str) -> None:
        """Raise :class:`BaseMismatchError` unless this node's base, at ``path``, is that of the server, ``other``."""
        both = self.config.keys() & other.config.keys()
        values = {f"config.json has {key}=": (self.config[key], other.config[key]) for key in sorted(both)}
        values["the vocabulary's size is "] = self.tokens, other.tokens
        values["the vocabulary's digest is "] = self.vocabulary, other.vocabulary
        values["the special tokens are "] = self.special, other.special
        values["the digest of a tokenized text is "] = self.encoding, other.encoding
        _check(values, path)


@lru_cache(maxsize=4)
def fingerprint(path: str) -> Fingerprint:
    """The fingerprint of a model; ``path`` as for :func:`hsplitlora_flwr.models.load_causal_lm`."""
    settings = read_config(path).to_dict()
    tokenizer = load_tokenizer(path)
    vocabulary = sorted(tokenizer.get_vocab().items())
    return Fingerprint(
        json.loads(json.dumps({key: settings[key] for key in settings.keys() - _UNSAID}, default=str, sort_keys=True)),
        len(vocabulary),
        _digest(json.dumps(vocabulary).encode()),
        _digest(json.dumps(list(tokenizer(_PROBE)["input_ids"])).encode()),
        json.dumps({key: str(token) for key, token in sorted(tokenizer.special_tokens_map.items())}),
    )


def part_digests(path: str, split: int, dtype: str, *, head: bool) -> dict[str, str]:
    """Digests of a client's tensors in the dtype of a run, by tensor.

    Parameters
    ----------
    path, split, dtype, head
        As for :func:`hsplitlora_flwr.models.load_client_parts`; a split at the number of blocks is the whole model.
    """
    cache = _Cache(path, dtype)
    part = f"{split}{'+head' * head}"
    if part not in cache.parts:
        tensors = PartTensors(path, split, dtype, head=head)
        missing = [name for name in tensors.names if name not in cache.digests]
        cache.digests |= {name: _digest_of(tensor) for name, tensor in tensors.read(missing)}
        cache.parts[part] = list(tensors.names)
        cache.save()
    return {name: cache.digests[name] for name in cache.parts[part]}


def check_part(digests: Mapping[str, str], path: str, split: int, dtype: str, *, head: bool) -> None:
    """Raise :class:`BaseMismatchError` unless the tensors of this node's part have the server's digests."""
    mine = part_digests(path, split, dtype, head=head)
    names = [*digests, *(name for name in mine if name not in digests)]
    values = {f"the digest of '{name}' is ": (mine.get(name, "none"), digests.get(name, "none")) for name in names}
    _check(values, path)


def _check(values: Mapping[str, tuple[Any, Any]], path: str) -> None:
    different = [
        f"{what}{here!r} here and {there!r} on the server" for what, (here, there) in values.items() if here != there
    ]
    if different:
        more = f", and {len(different) - 1} more differ" if len(different) > 1 else ""
        raise BaseMismatchError(
            f"model.path={path} of this node is not the base of the server: {different[0][:300]}{more}. Give the node "
            "the same model (model-path in its --node-config), or leave it out"
        )


class _Cache:
    """Digests by tensor, and which tensors a part has, for one state of a model's files."""

    def __init__(self, path: str, dtype: str) -> None:
        folder = Path(local_path(path))
        if not folder.is_dir():
            folder = Path(hf_hub_download(path, "config.json")).parent
        files = [*sorted(folder.glob("*.safetensors*")), folder / "config.json"]
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        key = _digest(json.dumps([str(folder.resolve()), states, dtype]).encode())
        self._file = platformdirs.user_cache_path("hsplitlora_flwr") / "fingerprints" / f"{key}.json"
        self.digests: dict[str, str] = {}
        self.parts: dict[str, list[str]] = {}
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self.digests, self.parts = dict(kept["digests"]), dict(kept["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none that can be used: it is made anew

    def save(self) -> None:
        """Keep all of it, if the disk lets us."""
        draft = self._file.with_suffix(f".{id(self)}.part")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({"digests": self.digests, "parts": self.parts}), encoding="utf-8")
            draft.replace(self._file)
            for old in sorted(self._file.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
                old.unlink(missing_ok=True)
        except OSError:
            with suppress(OSError):
                draft.unlink()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _digest_of(tensor: Tensor) -> str:
    """Of shape and values; a piece at a time, so that no second copy of a large tensor is made."""
    total = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for piece in tensor.reshape(-1).split(_CHUNK):
        total.update(piece.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
