"""The adapter of the round with the best perplexity, kept beside that of the last round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

BEST = "best"


def replace_best(run_folder: Path, write: Callable[[Path], object]) -> None:
    """Put what ``write`` writes into a folder in the place of the best adapter of before, all of it or nothing."""
    target, draft, old = (run_folder / name for name in (BEST, f"{BEST}.part", f"{BEST}.old"))
    for folder in (draft, old):
        shutil.rmtree(folder, ignore_errors=True)
    write(draft)
    if target.exists():
        target.rename(old)
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def take_best(earlier: Path, run_folder: Path) -> bool:
    """Take the best adapter of an earlier run over, if it has one; says whether it has."""
    if not (earlier / BEST).is_dir():
        return False
    replace_best(run_folder, lambda folder: shutil.copytree(earlier / BEST, folder))
    return True
