"""The plan of a run, without running it: ``python -m simulations.plan [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.plan`.
"""

from hsplitlora_flwr.cli.plan import command

if __name__ == "__main__":
    command()
