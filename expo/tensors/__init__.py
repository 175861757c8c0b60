"""Merges in memory: arrays and tensors, live models, and streams of tensors."""
