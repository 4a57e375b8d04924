"""Split fine-tuning: the client's half of a step, the server's half, and evaluation."""
