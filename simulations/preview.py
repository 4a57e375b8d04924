"""What a run would train on, without training: ``python -m simulations.preview [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.preview`.
"""

import sys

from hsplitlora_flwr.cli.__main__ import main

if __name__ == "__main__":
    main(["preview", *sys.argv[1:]], "python -m simulations.{}")
