"""`save`, `load`, `build`, `inspect` and `verify`: they join the rooms and do nothing themselves."""

from orthoserde.api.loading import build, load
from orthoserde.api.reading import inspect, verify
from orthoserde.api.saving import Base, Prepared, prepare, save

__all__ = ["Base", "Prepared", "build", "inspect", "load", "prepare", "save", "verify"]
