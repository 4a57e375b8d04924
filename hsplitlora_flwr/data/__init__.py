"""Text: reading it, dealing it to clients, and turning it into batches of token ids."""

from hsplitlora_flwr.data.sources import DataError, Example, hold_out

__all__ = ["DataError", "Example", "hold_out"]
