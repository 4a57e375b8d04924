"""The benchmarks of :mod:`simulations.benchmark`, a module for each; a benchmark's docstring says what it compares."""
