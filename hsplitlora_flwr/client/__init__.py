"""A client: what it answers to Flower's messages, its part of a task, and what it keeps on its disk."""
