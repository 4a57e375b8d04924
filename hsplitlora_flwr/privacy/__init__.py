"""What a curious server can learn from the cut: attacks that measure it."""
