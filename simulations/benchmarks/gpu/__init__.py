"""``gpu``: what is exact on a GPU, how fast it is, and what memory it takes, in one run of at most eight minutes.

Of all of the package it uses nothing that needs Flower, Ray, Hydra, gRPC or a network: client and server are in this
process, on one device, and weights are random numbers made there. So beside torch, transformers, peft and accelerate it
needs pydantic, and bitsandbytes for the part in 4 bits.
"""

from simulations.benchmarks.gpu.parts import gpu

__all__ = ["gpu"]
