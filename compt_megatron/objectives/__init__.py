"""Objectives: features or logits of a batch -> this rank's share of the global batch's loss."""
