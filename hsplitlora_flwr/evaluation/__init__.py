"""Measuring a model: perplexity of held-out text, generated texts and their scores."""
