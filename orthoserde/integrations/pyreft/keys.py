"""How pyvene names interventions, over its versions.

Note [Names of interventions]
0.0.1 to 0.0.6  ``layer.{l}.repr.{r}.unit.{u}.nunit.{n}#{i}``
0.0.8 to 0.1.6  ``layer.{l}.comp.{c}.unit.{u}.nunit.{n}#{i}``, or ``comp.{c}.unit...`` for a component that is a path
from 0.1.7      the same with ``_`` for every ``.``, also within a component that is a path: ``transformer_h[0]_output``
"""

from __future__ import annotations

import re

PREFIX = "intkey_"
SUFFIX = ".bin"

_OLDEST = re.compile(r"(layer_\d+)_repr_(.+_unit_.+_nunit_\d+#\d+)")
_NAME = re.compile(r"(?:layer_\d+_)?comp_.+_unit_.+_nunit_\d+#\d+")


def normalize(key: str) -> str | None:
    """The name that pyvene 0.1.7 and later give an intervention; None for what is no name of one."""
    name = key.replace(".", "_")
    oldest = _OLDEST.fullmatch(name)
    if oldest is not None:
        name = f"{oldest[1]}_comp_{oldest[2]}"
    return name if _NAME.fullmatch(name) else None


def key_of_file(name: str) -> str | None:
    """The normalized key in a file name; None for a file of another sort."""
    if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
        return None
    return normalize(name[len(PREFIX) : -len(SUFFIX)])
