"""What the options of `compt` take, from the text that a user wrote. All raise ArgumentTypeError for what it is not."""

from __future__ import annotations

import argparse
from math import inf

from compt_megatron.cli_parser import count


def share(text: str) -> float:
    """A share of at least 0 and less than 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of at least 0 and less than 1, such as 0.05")
    return value


def names(text: str) -> list[str]:
    """Names, separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names, such as arc_easy,hellaswag")
    return names


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else count(text)


def noise(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0, such as 0.01")
    return value


def template(text: str) -> str:
    """A prompt with a place for the class name."""
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no '{{}}' for the class name, such as 'a photo of {{}}'")
    return text


def axis(text: str) -> tuple[str, str]:
    """AXIS=MODE."""
    axis, equals, mode = text.partition("=")
    if not (axis and equals and mode):
        raise argparse.ArgumentTypeError(f"{text!r} is not AXIS=MODE, such as mlp=append")
    return axis, mode
