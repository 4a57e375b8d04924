"""The plan of a run, without running it: ``python -m simulations.plan [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.plan`.
"""

import sys

from hsplitlora_flwr.cli.__main__ import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]], "python -m simulations.{}")
