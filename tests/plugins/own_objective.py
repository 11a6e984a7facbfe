"""A user's own objective: the target is the teacher's features of clean samples."""

from dataclasses import dataclass

import torch

from selfflow import register_objective
from selfflow.method.objective import FeatureObjective, Projector
from selfflow.method.schedule import NoiseLevels


@dataclass(frozen=True)
class Options:
    student_layer: int = 1  # 1-based
    teacher_layer: int = 2  # 1-based
    rep_weight: float = 0.3  # of the representation loss


@register_objective("clean_view", options=Options)
class CleanView(FeatureObjective):
    "The student predicts the teacher's features of the clean sample."

    def __init__(
        self, model, schedule, student_layer, teacher_layer, rep_weight, **options
    ):
        super().__init__(schedule, student_layer, rep_weight, **options)
        self.teacher_layer = teacher_layer
        self.projector = Projector(model.width)

    def target(self, teacher, noised, hidden, draw):
        batch = noised.batch
        levels = NoiseLevels.single(
            torch.zeros(len(batch), device=batch.x0.device), batch.x0.shape[1]
        )
        out = teacher(
            batch.x0,
            levels,
            batch.condition,
            taps=(self.teacher_layer,),
            stop=True,
            parts=batch.parts,
        )
        return out.features[self.teacher_layer], levels.per_token()
