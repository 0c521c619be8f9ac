"""The checkpoints of a run in one folder: names, the newest, the best, rotation, saves in the background."""

from orthoserde.folder.checkpoints import Checkpoints, SaveArguments

__all__ = ["Checkpoints", "SaveArguments"]
