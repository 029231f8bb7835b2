"""Stands for causal_conv1d 1.7."""
