"""Training in one process: where batches come from, the optimizer, the loop, checkpoints, and what is logged."""
