"""The server: the strategy, who takes part, the shard that serves them, and what a run keeps."""
