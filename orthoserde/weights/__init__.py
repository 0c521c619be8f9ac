"""Computed tensors and their distance from constraints, from state alone: of live models, and of checkpoints."""
