"""HSplitLoRA for Flower: language models fine-tuned on private data that cannot leave weak, uneven machines."""
