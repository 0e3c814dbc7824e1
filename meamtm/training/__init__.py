"""Batches and a model -> a trained checkpoint."""
