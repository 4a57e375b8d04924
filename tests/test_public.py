"""The public names, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_public_names() -> None:
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import Strategy

    import hsplitlora_flwr

    assert issubclass(hsplitlora_flwr.HSplitLoRA, Strategy)
    assert isinstance(hsplitlora_flwr.split_client_app(), ClientApp)
    assert hsplitlora_flwr.Config().train.rounds > 0
    with pytest.raises(AttributeError, match="nothing"):
        hsplitlora_flwr.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("models", ("load_causal_lm", "split_model", "list_families")),
        ("lora", ("aggregate", "save_peft_adapter")),
        ("planning", ("Budget", "make_plan")),
    ],
)
def test_names_of_the_parts(module: str, names: tuple[str, ...]) -> None:
    part = __import__(f"hsplitlora_flwr.{module}", fromlist=names)
    assert all(callable(getattr(part, name)) for name in names)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, hsplitlora_flwr; print({'torch', 'flwr', 'transformers', 'ray'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_method_imports_no_framework() -> None:
    """models, lora, planning, training and data work on a plain machine: no Flower, Ray, Hydra or gRPC is loaded."""
    code = (
        "import sys\n"
        "import hsplitlora_flwr.models, hsplitlora_flwr.lora, hsplitlora_flwr.planning, hsplitlora_flwr.data.sources\n"
        "import hsplitlora_flwr.training.client, hsplitlora_flwr.training.server\n"
        "print({'flwr', 'ray', 'hydra', 'grpc'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
