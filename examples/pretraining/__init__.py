"""Pre-training on plain text, fine-tuning on few labels, and what the first is worth for the second."""
