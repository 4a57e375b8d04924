"""Text for a run: where it comes from, how clients share it, and how it becomes batches."""
