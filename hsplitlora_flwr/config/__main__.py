"""``python -m hsplitlora_flwr.config``: the settings as ``pyproject.toml`` has them for Flower."""

from hsplitlora_flwr.config import render_pyproject_block

print(render_pyproject_block(), end="")
