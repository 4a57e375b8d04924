"""The arrays of the planning problem, by what they hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Ranks = NDArray[np.uint8]
"""Indices into ``Problem.ranks``, 0 = no adapter, by layer of ``CostModel.layers`` in the last dimension."""
