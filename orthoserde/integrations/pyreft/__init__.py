"""pyreft and pyvene: their models as they are, their folders, and a way back to them.

Nothing here imports either of them. What is theirs is found by the names of the classes that it is made from.

Source: pyreft 0.1.0 (``interventions.py``, ``reft_model.py``) and pyvene 0.1.8 (``models/intervenable_base.py``,
``models/interventions.py``); file names of earlier versions as their releases wrote them.
"""

from orthoserde.integrations.pyreft.classes import extend
from orthoserde.integrations.pyreft.folders import read
from orthoserde.integrations.pyreft.listing import is_folder
from orthoserde.integrations.pyreft.writing import write

__all__ = ["extend", "is_folder", "read", "write"]
