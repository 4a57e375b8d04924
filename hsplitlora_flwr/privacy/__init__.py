"""What a curious server can learn from a client's text: attacks that measure it, and protections."""
