"""The runs of a sweep side by side: ``python -m simulations.sweep FOLDER``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.sweep`.
"""

import sys

from hsplitlora_flwr.cli.__main__ import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]], "python -m simulations.{}")
