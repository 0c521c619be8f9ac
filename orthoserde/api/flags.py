"""Arguments that are True or False, and nothing that Python would take for one of these."""

from __future__ import annotations


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False: ``rng=generator`` reads as if that generator were saved.

    Raises:
        TypeError: Something is not.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            hint = "; a generator of your own goes into state=" if name == "rng" else ""
            raise TypeError(f"{name}: expected True or False, got {type(value).__name__}{hint}")
