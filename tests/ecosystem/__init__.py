"""Tests against models of transformers, geotorch and stacks of torch's own; run by ``nox -s ecosystem``."""
