"""Show that a checkpoint goes on: load it in a new process, train a few steps, and compare."""

from orthoserde.proof.proving import prove
from orthoserde.proof.report import Difference, Grade, Proof

__all__ = ["Difference", "Grade", "Proof", "prove"]
