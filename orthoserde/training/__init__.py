"""Optimizers, the user's own state and random generators: into a checkpoint, and out of one."""

from orthoserde.training.capture import with_training
from orthoserde.training.optimizers import labelled
from orthoserde.training.restore import NOTHING, Targets, TrainingPlan, plan_training

__all__ = ["NOTHING", "Targets", "TrainingPlan", "labelled", "plan_training", "with_training"]
