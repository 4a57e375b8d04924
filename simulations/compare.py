"""Methods x client settings x seeds: ``python -m simulations.compare [options] [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.compare`.
"""

from hsplitlora_flwr.cli.compare import command

if __name__ == "__main__":
    command()
