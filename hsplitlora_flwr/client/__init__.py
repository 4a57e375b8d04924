"""The client: how it answers Flower's messages, does its part of a task, and keeps state on disk."""
