"""Methods x client settings x seeds: ``python -m simulations.compare [options] [overrides]``.

What it does and how is said in :mod:`hsplitlora_flwr.cli.compare`.
"""

import sys

from hsplitlora_flwr.cli.__main__ import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]], "python -m simulations.{}")
