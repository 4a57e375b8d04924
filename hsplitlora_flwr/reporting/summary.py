"""``summary.json``: what a run was and what came out of it, complete after every round."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"
_PACKAGES = ("hsplitlora-flwr", "flwr", "torch", "transformers", "peft", "ray")


class Summary:
    """The summary of a run folder, rewritten in one piece whenever it is saved.

    Parameters
    ----------
    folder : Path
        The run folder.
    config : dict
        The settings as dotted keys.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._path = folder / SUMMARY_FILE
        self.content: dict[str, Any] = {
            "status": "running",
            "started": time.time(),
            "config": config,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "perplexity_before": None,
            "perplexity_after": None,
            "rounds": [],
        }

    def resume(self, run_folder: Path, server_round: int) -> None:
        """Take over what the summary of another run says of its rounds up to ``server_round``.

        Raises
        ------
        OSError, ValueError
            If there is none that can be read.
        """
        earlier = json.loads((run_folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        for name in ("rounds", "plans", "importance_drift"):
            if name in earlier:
                self.content[name] = [row for row in earlier[name] if row["round"] <= server_round]
        kept = {name: earlier[name] for name in ("perplexity_before", "importance") if name in earlier}
        self.save(**kept, resumed={"run": str(run_folder), "after_round": server_round})

    def save(self, **changes: Any) -> None:
        """Take over ``changes`` and write the file; a reader sees the old content or the new, never a half."""
        self.content.update(changes, seconds=time.time() - self.content["started"])
        draft = self._path.with_suffix(".json.part")
        draft.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        draft.replace(self._path)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
