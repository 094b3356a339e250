"""What the programs share: batches, the training loop, checkpoints, logs, processes."""
