"""Optimizers, the user's own state and random generators: into a checkpoint, and out of one."""

from orthoserde.training.capture import with_training
from orthoserde.training.restore import NOTHING, Targets, TrainingPlan, plan_training

__all__ = ["NOTHING", "Targets", "TrainingPlan", "plan_training", "with_training"]
