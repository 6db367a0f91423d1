"""Distillation: a teacher's distribution brought into a student."""

from kullback.distill.sinkd import SinkhornKD, sinkd_loss

__all__ = ["SinkhornKD", "sinkd_loss"]
