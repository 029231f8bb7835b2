"""Training in one process: sources of batches, the optimizer, the loop, checkpoints, the log."""
