"""Orthogonal parametrizations in the canonical chart, on live modules: registered so, or brought there in training.

Note [Charts]
Torch's trivialized orthogonal parametrization computes ``weight = base @ map(original)``. For n > k the first k
columns of ``base`` are the weight at registration; the other n - k are any orthonormal completion of them. Which one is
a choice of coordinates: with another, the same weights are reached at other values of ``original``. The canonical
completion is a function of the first columns alone, so it takes no random numbers, and n k numbers stand for n n.
"""
