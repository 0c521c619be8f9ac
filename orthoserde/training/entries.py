"""What torch's optimizers keep for a parameter, so that a file that says otherwise can be refused."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Forms of an entry: one number, a tensor like the parameter, such a tensor or None, the factors of Adafactor, and what
#: LBFGS keeps for all parameters together.
SCALAR, LIKE, MAYBE, FACTOR, FREE = "scalar", "like", "maybe", "factor", "free"

_ADAM = {"step": SCALAR, "exp_avg": LIKE, "exp_avg_sq": LIKE, "max_exp_avg_sq": LIKE}

#: Entries by the name of the class in ``torch.optim``.
ENTRIES: Mapping[str, Mapping[str, str]] = {
    "ASGD": {"step": SCALAR, "eta": SCALAR, "mu": SCALAR, "ax": LIKE},
    "Adadelta": {"step": SCALAR, "square_avg": LIKE, "acc_delta": LIKE},
    "Adafactor": {"step": SCALAR, "row_var": FACTOR, "col_var": FACTOR, "variance": LIKE},
    "Adagrad": {"step": SCALAR, "sum": LIKE},
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": {"step": SCALAR, "exp_avg": LIKE, "exp_inf": LIKE},
    "LBFGS": dict.fromkeys(
        [
            "func_evals",
            "n_iter",
            "d",
            "t",
            "old_dirs",
            "old_stps",
            "ro",
            "H_diag",
            "prev_flat_grad",
            "prev_loss",
            "al",
        ],
        FREE,
    ),
    "Muon": {"momentum_buffer": LIKE},
    "NAdam": {"step": SCALAR, "mu_product": SCALAR, "exp_avg": LIKE, "exp_avg_sq": LIKE},
    "RAdam": {"step": SCALAR, "exp_avg": LIKE, "exp_avg_sq": LIKE},
    "RMSprop": {"step": SCALAR, "square_avg": LIKE, "momentum_buffer": LIKE, "grad_avg": LIKE},
    "Rprop": {"step": SCALAR, "prev": LIKE, "step_size": LIKE},
    "SGD": {"momentum_buffer": MAYBE},
    "SparseAdam": {"step": SCALAR, "exp_avg": LIKE, "exp_avg_sq": LIKE},
}


def is_of_torch(module: str) -> bool:
    """Whether classes of a module are those of ``torch.optim``, as Adafactor and Muon are; of others nothing is known.

    Args:
        module: Its name, or ``module:qualname`` of a class.
    """
    return f"{module.replace(':', '.')}.".startswith("torch.optim.")


def odd_entry(cls: type, entries: object, shape: torch.Size) -> str | None:
    """What keeps entries from being those that an optimizer keeps for a parameter; None if nothing is known to.

    Args:
        cls: Class of the optimizer; of those outside of ``torch.optim`` nothing is known.
        entries: What is to become its state for the parameter.
        shape: Shape of the parameter.
    """
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        return "expected entries by name"
    known = ENTRIES.get(cls.__name__) if is_of_torch(cls.__module__) else None
    if known is None:
        return None
    for name, value in entries.items():
        if name not in known:
            return f"{cls.__name__} keeps no {name!r}"
        problem = _odd_value(known[name], value, shape)
        if problem is not None:
            return f"{name}: {problem}"
    return None


def _odd_value(form: str, value: object, shape: torch.Size) -> str | None:
    if form == FREE or (form == MAYBE and value is None):
        return None
    if form == SCALAR:
        one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
        return None if one else "expected one number"
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    shapes = [list(shape)]
    if form == FACTOR and len(shape) > 1:
        shapes = [[*shape[:-1], 1], [*shape[:-2], 1, shape[-1]]]
    if list(value.shape) not in shapes:
        return f"expected the shape {' or '.join(map(str, shapes))}, got {list(value.shape)}"
    return None


def spans_parameters(entries: object, numel: int) -> bool:
    """Whether a tensor among entries has more elements than the parameter, so that it belongs to others too."""
    if isinstance(entries, Tensor):
        return entries.numel() > max(numel, 1)
    if isinstance(entries, (list, tuple)):
        return any(spans_parameters(entry, numel) for entry in entries)
    return isinstance(entries, dict) and any(spans_parameters(entry, numel) for entry in entries.values())
