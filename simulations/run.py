"""One federated run on this machine: ``python -m simulations.run [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.run`.
"""

import sys

from hsplitlora_flwr.cli.__main__ import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]], "python -m simulations.{}")
