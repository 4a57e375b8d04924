"""The server: the strategy, the clients of a run, the shard that serves them, and checkpoints."""
