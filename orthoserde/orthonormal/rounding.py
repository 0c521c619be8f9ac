"""How far a matrix is from orthonormal columns, and how far rounding takes one.

Note [Rounding or damage]
Measured in float32 on weights of torch's three maps, 4 x 4 to 1024 x 1024, in units of eps: the largest entry of
Q^T Q - I is at most 404 and the root of its mean square at most 18. A weight that went through bfloat16 has a mean of
20000 / sqrt(n), one that went through float16 2500 / sqrt(n): the mean tells them from rounding up to n = 7000 for
float16 and far beyond for bfloat16, where the largest entry, or torch's own 10 n eps, does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: What rounding leaves of ``Q^H Q - I``, in units of eps: its largest entry, and the root of its mean square.
LARGEST_ROUNDING = 1000.0
MEAN_ROUNDING = 30.0


def tall(weight: Tensor) -> Tensor:
    """The weight, or its transpose, with the longer side first."""
    return weight.mT if weight.size(-2) < weight.size(-1) else weight


def gram_error(weight: Tensor) -> Tensor:
    """``Q^H Q - I`` in double precision, Q the weight with its longer side first."""
    wide = tall(weight.detach()).to(torch.complex128 if weight.is_complex() else torch.float64)
    return wide.mH @ wide - torch.eye(wide.size(-1), dtype=wide.dtype, device=wide.device)
