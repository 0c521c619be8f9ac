"""Give things back what they had."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What puts something back that a load has changed.
Undo = Callable[[], None]


def undo_all(steps: Sequence[tuple[str, Undo]]) -> list[str]:
    """Undo everything, the last first, whatever one of the steps raises.

    Args:
        steps: What is given back, in words, and how.

    Returns:
        What could not be given back, with why.
    """
    failures: list[str] = []
    for name, step in reversed(steps):
        try:
            step()
        except Exception as error:  # whatever a user's load_state_dict raises: the others are undone all the same
            failures.append(f"{name} ({type(error).__name__}: {error})")
    return failures
