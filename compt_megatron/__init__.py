"""Chain-of-Models Pre-Training at scale: grow a model into the next larger one, align it, train the whole family."""

__version__ = "0.1.0"
