"""What a node keeps of a run on its disk: the accumulated update, and training that continues over messages.

Every Flower message may start a new process, and ``Context.state`` silently loses large values. So tensors are stored
on disk under the ids of the run and the node, and ``Context.state`` holds only their place. Everything is deleted when
the run ends; what an interrupted run left behind is deleted after a week.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsplitlora_flwr.lora.export import DELTA_FILE, load_held, load_update, save_update
from hsplitlora_flwr.lora.update import BASE, AccumulatedUpdate, Change, Patch, UpdateError
from hsplitlora_flwr.paths import nodes_folder

log = logging.getLogger(__name__)

_POINTER, _FOLDER = "hsplitlora", "folder"
_TRAINING, _NUMBERS, _SECRET = "training.safetensors", "measured.json", "secret"
_WEEK = 7 * 24 * 3600.0


class NodeStateError(RuntimeError):
    """What a message needs from earlier messages is not on this node's disk."""


class NodeStore:
    """A node's folder for one run.

    Parameters
    ----------
    context : Context
        Of the node; ``state-dir`` of its configuration says where such folders lie, else the user's cache directory.
    """

    def __init__(self, context: Context) -> None:
        wanted = context.node_config.get("state-dir")
        self._root = Path(str(wanted)) if wanted else nodes_folder()
        self.folder = self._root / str(context.run_id) / str(context.node_id)
        self._context = context

    def held(self) -> tuple[int, dict[str, str]]:
        """Version of the accumulated update, and the state of every layer of it that this node has held."""
        try:
            return load_held(self.folder)
        except FileNotFoundError:
            return 0, {}
        except UpdateError as error:
            self._forget_update(error)
            return 0, {}

    def changes(self) -> Mapping[str, Change]:
        """The accumulated update of the layers that this node has held, by absolute layer name.

        Raises
        ------
        UpdateError
            If what is on disk is damaged; then it is removed, and the server has to send it anew.
        """
        return self._delta().changes()

    def update(self, patch: Patch) -> Mapping[str, Change]:
        """Bring the accumulated update up to date, keep it, and return it as :meth:`changes` does.

        Raises
        ------
        UpdateError
            If the patch builds on an update that is not here, or not any more, as when it was damaged.
        """
        accumulated = self._delta(without={name for name, part in patch.layers.items() if part.start == BASE})
        accumulated.apply(patch)
        if patch.layers:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_update(accumulated, self.folder)
        return accumulated.changes()

    def _delta(self, without: Collection[str] = ()) -> AccumulatedUpdate:
        try:
            return load_update(self.folder, without=without)
        except FileNotFoundError:
            return AccumulatedUpdate()
        except UpdateError as error:
            self._forget_update(error)
            raise

    def _forget_update(self, error: UpdateError) -> None:
        log.warning("the update is fetched anew: %s", error)
        (self.folder / DELTA_FILE).unlink()

    def save_training(self, tensors: Mapping[str, Tensor], text: Mapping[str, Any]) -> None:
        """Keep training that goes on with the next message; ``text`` is anything that JSON holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{_TRAINING}.part"
        save_file({name: t.contiguous() for name, t in tensors.items()}, draft, metadata={"text": json.dumps(text)})
        draft.replace(self.folder / _TRAINING)
        self._context.state[_POINTER] = ConfigRecord({_FOLDER: str(self.folder)})

    def load_training(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`save_training` kept.

        Raises
        ------
        NodeStateError
            If there is none, or it is damaged.
        """
        pointer = self._context.state.config_records.get(_POINTER)
        if pointer is None:
            raise NodeStateError("this node has no training under way; was its SuperNode started anew?")
        file = Path(str(pointer[_FOLDER])) / _TRAINING
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
                return tensors, json.loads(stored.metadata()["text"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise NodeStateError(f"{file}, training that is under way, cannot be read: {error}") from None

    def end_training(self) -> None:
        """Forget training that was under way."""
        (self.folder / _TRAINING).unlink(missing_ok=True)
        self._context.state.pop(_POINTER, None)

    def secret(self) -> str:
        """A random secret of this node for the run."""
        file = self.folder / _SECRET
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".part")
            draft.touch(mode=0o600)
            draft.write_text(secrets.token_hex(32), encoding="utf-8")
            draft.replace(file)
        return file.read_text(encoding="utf-8")

    def number(self, name: str) -> float:
        """A measurement noted earlier in this run; 0 if there is none."""
        return float(self._numbers().get(name, 0.0))

    def note(self, **numbers: float) -> None:
        """Note measurements for the rest of the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _NUMBERS).write_text(json.dumps(self._numbers() | numbers), encoding="utf-8")

    def steady(self, name: str, measured: float) -> float:
        """A measurement without its noise: the one noted before, unless the new one is a tenth away from it.

        A plan is made anew when a budget changes, which no two measurements would spare.
        """
        before = self.number(name)
        if before and abs(measured - before) <= 0.1 * before:
            return before
        self.note(**{name: measured})
        return measured

    def _numbers(self) -> dict[str, float]:
        try:
            numbers: dict[str, float] = json.loads((self.folder / _NUMBERS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return numbers

    def forget(self) -> None:
        """Delete everything of this run, and what interrupted runs left here more than a week ago."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other nodes of this machine may be at it too
            for run in filter(Path.is_dir, list(self._root.iterdir())):
                for node in list(run.iterdir()):
                    if time.time() - node.stat().st_mtime > _WEEK:
                        shutil.rmtree(node, ignore_errors=True)
                if not any(run.iterdir()):
                    run.rmdir()
