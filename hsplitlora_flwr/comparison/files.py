"""Writing result files that others may read at any time."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replace a file in one piece: whoever is killed here leaves the old one."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
