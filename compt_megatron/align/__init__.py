"""Alignment of a student's features to those of its frozen predecessor (inverse feature distillation)."""
