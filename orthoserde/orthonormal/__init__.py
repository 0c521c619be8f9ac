"""Matrices with orthonormal columns: the mathematics, pure functions of tensors that know nothing of modules."""
