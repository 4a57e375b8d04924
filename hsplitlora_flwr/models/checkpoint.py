"""The files of a model: which tensors they hold, read one at a time.

Files are memory-mapped, so bytes that nobody asks for never enter the process.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hsplitlora_flwr.models.demo import demo_model, is_demo_model

ADAPTER_FILE = "adapter_config.json"
"""Says that a folder holds a PEFT adapter."""
_POINTER = b"version https://git-lfs"
_FEW = 16
"""As many integers at most are taken for a shape, or the like, and not for packed weights."""


class ModelFilesError(ValueError):
    """A model's files are missing, incomplete or not in a format that is read."""


class Checkpoint:
    """Tensors by the names that files give them, from safetensors in a folder or on the hub.

    Parameters
    ----------
    path : str
        As for :func:`hsplitlora_flwr.models.load_causal_lm`.
    fetch : bool
        Whether files that are not here may be fetched from the hub.

    Raises
    ------
    ModelFilesError
        If there are no weights, or an adapter beside them.
    """

    def __init__(self, path: str, *, fetch: bool = True) -> None:
        self.path, self._fetch = path, fetch
        self._shards: dict[str, Path] = {}
        if self._file(ADAPTER_FILE) is not None:
            raise ModelFilesError(
                f"model.path={path}: it holds a PEFT adapter ({ADAPTER_FILE}), which would not be used; merge it into "
                "its model with peft (merge_and_unload), save_pretrained that, and name the new folder"
            )
        if (single := self._file("model.safetensors")) is not None:  # the order in which transformers looks
            with self._open(single) as tensors:
                self._shard_of: dict[str, str] = dict.fromkeys(tensors.keys(), single.name)
            self._shards[single.name] = single
        elif (index := self._file("model.safetensors.index.json")) is not None:
            self._shard_of = self._read_index(index)
        else:
            raise ModelFilesError(
                f"model.path={path}: there are no weights (model.safetensors or model.safetensors.index.json); "
                "pickled weights are not read: load them with transformers and save_pretrained them once"
            )

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._shard_of.keys()

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors called ``names``, memory-mapped.

        Every tensor has a mapping of its own: pages that were read stay in memory for no longer than their tensor.

        Raises
        ------
        ModelFilesError
            If a file is missing or damaged.
        """
        for name in names:
            with self._open(self._shard(self._shard_of[name])) as tensors:
                tensor = self._tensor(tensors, name)
            yield name, tensor
            del tensor

    def outlines(self) -> dict[str, Tensor]:
        """The shapes and dtypes of all tensors: they have no memory, but for a few integers, which may be a shape.

        Raises
        ------
        ModelFilesError
            If a file is missing or damaged.
        """
        found = {}
        for shard, names in groupby(sorted(self.names, key=self._shard_of.__getitem__), self._shard_of.__getitem__):
            with self._open(self._shard(shard)) as tensors:
                for name in names:
                    tensor = self._tensor(tensors, name)
                    is_shape = tensor.dtype in (torch.int32, torch.int64) and tensor.numel() <= _FEW
                    found[name] = tensor.clone() if is_shape else tensor.to("meta")
        return found

    def _read_index(self, file: Path) -> dict[str, str]:
        """Which file holds each tensor."""
        try:
            return {str(name): str(shard) for name, shard in json.loads(file.read_bytes())["weight_map"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelFilesError(
                f"model.path={self.path}: {file.name} names no file for each tensor; restore it from a copy"
            ) from error

    def _tensor(self, tensors: Any, name: str) -> Tensor:
        try:
            tensor: Tensor = tensors.get_tensor(name)
        except SafetensorError as error:
            raise ModelFilesError(
                f"model.path={self.path}: '{name}' cannot be read from {self._shard_of[name]}: {error}"
            ) from error
        return tensor

    def _shard(self, name: str) -> Path:
        if name not in self._shards:  # the hub is asked once
            file = self._file(name)
            if file is None:
                raise ModelFilesError(f"model.path={self.path}: the weight file {name} is missing")
            self._shards[name] = file
        return self._shards[name]

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            why = f"damaged: {error}"
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    why = "a pointer of Git LFS and no weights; fetch them with git lfs pull"
            raise ModelFilesError(f"model.path={self.path}: the weight file {file.name} is {why}") from error

    def _file(self, name: str) -> Path | None:
        folder = Path(local_path(self.path))
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.path, name, local_files_only=not self._fetch))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ModelFilesError(f"model.path={self.path}: {name} cannot be fetched from the hub: {error}") from error


def local_path(path: str) -> str:
    """The folder of the demonstration model, or ``path`` itself: a folder or a hub name."""
    return str(demo_model()) if is_demo_model(path) else path
