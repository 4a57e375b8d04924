"""The configuration of a model: from a folder, from the hub, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers import __version__ as transformers_version

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.config.names import DTYPES
from hsplitlora_flwr.models.checkpoint import ADAPTER_FILE, ModelFilesError, local_path
from hsplitlora_flwr.models.conversion import parts_of, take_quantisation
from hsplitlora_flwr.models.multimodal import text_config
from hsplitlora_flwr.models.proof import brief

_HUB_SECONDS = 5.0


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a model, without its weights; how they are quantised in files is left out.

    Of a multimodal model it is that of its text decoder.

    Raises
    ------
    ModelFilesError
        If ``path`` is neither a model folder nor a model of the hub that can be reached.
    UnsupportedModelError
        If the text decoder of a multimodal model is no causal LM of its own.
    """
    config = read_stored_config(path)
    take_quantisation(config)
    return text_config(config)


def read_stored_config(path: str) -> PretrainedConfig:
    folder = local_path(path)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        what = " but a PEFT adapter; merge it into its model" if (Path(folder) / ADAPTER_FILE).is_file() else ""
        raise ModelFilesError(
            f"model.path={path}: the folder holds no config.json{what}; name a folder in Hugging Face format"
        )
    away = "" if Path(folder).is_dir() else _hub_is_away(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=bool(away))
    except (OSError, ValueError, StrictDataclassError) as error:
        what = f"no folder of that name, and not readable as a hub name: {error}"
        if away:
            what = (
                f"no folder of that name, not among the models fetched before, and the hub cannot be reached ({away}); "
                "name a folder, or mend the connection (HF_ENDPOINT and https_proxy say where it goes)"
            )
        if Path(folder).is_dir():
            what = _wrong_config(Path(folder) / "config.json", error)
        raise ModelFilesError(f"model.path={path}: {what}") from error
    assert isinstance(config, PretrainedConfig)
    return config


@lru_cache(maxsize=8)
def _hub_is_away(name: str) -> str:
    """Why the hub cannot be reached; "" if it answers, whatever it says.

    One question with a short wait: what fetches files asks six times, which takes most of a minute.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        pass  # an answer, or no name to ask for: what reads the configuration says it better
    except Exception as error:  # of whatever library asks
        return brief(error)
    return ""


def _wrong_config(file: Path, error: Exception) -> str:
    """What is wrong with a ``config.json`` that transformers does not take."""
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return f"its config.json is damaged ({brief(error)}); restore it from a copy"
    if not kind:
        return "its config.json names no model_type; name a folder of a causal language model in Hugging Face format"
    if kind not in CONFIG_MAPPING:
        return (
            f"its config.json names the model type '{kind}', which transformers {transformers_version} does not know; "
            "install a newer one, or name another model (code that comes with a model is not run)"
        )
    return f"its config.json is not one of a '{kind}': {brief(error)}"


def with_model_dtype(config: Config) -> Config:
    """The same settings with the dtype in which the base is held, where ``model.dtype=auto`` leaves that to the model.

    Raises
    ------
    ModelFilesError, UnsupportedModelError
        As for :func:`read_config`.
    """
    if config.model.dtype != "auto":
        return config
    stored = str(read_config(config.model.path).dtype).removeprefix("torch.")
    # float16 has too few exponents to train beside; float32 holds each of its numbers
    dtype = stored if stored in DTYPES else "float32"
    return replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]


def tied_parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration, and those inside it, that tie a head to embeddings."""
    return [part for part in parts_of(config) if getattr(part, "tie_word_embeddings", False)]
