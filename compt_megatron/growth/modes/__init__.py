"""Axis modes, one a file; `growth/axes.py` is their registry."""
