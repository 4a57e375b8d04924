"""What a curious server reads off the cut: ``python -m simulations.attack [options] [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.attack`.
"""

import sys

from hsplitlora_flwr.cli.__main__ import main

if __name__ == "__main__":
    main(["attack", *sys.argv[1:]], "python -m simulations.{}")
