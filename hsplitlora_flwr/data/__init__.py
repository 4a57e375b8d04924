"""Text: where it comes from, how it is dealt to clients, and how it becomes batches."""

from hsplitlora_flwr.data.sources import DataError, Example, hold_out

__all__ = ["DataError", "Example", "hold_out"]
