"""Hugging Face: our models as `transformers` classes, and as folders that load without this package."""
