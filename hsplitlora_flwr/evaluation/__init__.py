"""How good a model is: perplexity of held-out text, written texts and their scores."""
