"""Distillation: a teacher's distribution brought into a student."""
