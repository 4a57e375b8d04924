"""One federated run on this machine: ``python -m simulations.run [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.run`.
"""

from hsplitlora_flwr.cli.run import command

if __name__ == "__main__":
    command()
