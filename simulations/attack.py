"""What a curious server reads off the cut: ``python -m simulations.attack [options] [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.attack`.
"""

from hsplitlora_flwr.cli.attack import command

if __name__ == "__main__":
    command()
