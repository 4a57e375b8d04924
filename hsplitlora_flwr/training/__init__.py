"""Split fine-tuning: the client's side of a step, the server's side, optimizer and schedule."""
