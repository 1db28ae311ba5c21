"""Numbers as people read them: 1.53 M parameters, 4.2 T MACs, 0:03:12."""

from __future__ import annotations

import math

UNKNOWN = "-"
_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def is_known(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def human(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and an SI letter: 1.53 M, 4.2 T, 832."""
    if value is None or not is_known(value):
        return UNKNOWN
    magnitude = abs(float(value))
    if magnitude < 1000 and float(value).is_integer():
        return str(int(value))
    power = 0
    while power < len(_UNITS) - 1 and float(f"{magnitude:.{digits}g}") >= 1000:
        magnitude /= 1000
        power += 1
    text = f"{magnitude:.{digits}g}"
    if "e" in text:
        text = f"{magnitude:.0f}" if magnitude >= 1 else text
    sign = "-" if value < 0 else ""
    return f"{sign}{text} {_UNITS[power]}".rstrip()


def scale_of(value: float) -> tuple[float, str]:
    """(1e12, "T ") for numbers about that large: the factor and the unit letter of an axis."""
    power = 0 if value < 1000 else min(len(_UNITS) - 1, int(math.log10(value) + 1e-9) // 3)
    return 1000.0**power, f"{_UNITS[power]} " if power else ""


def macs(value: float | None, digits: int = 3) -> str:
    """Multiply-accumulates: 4.2 T MACs."""
    text = human(value, digits)
    return text if text == UNKNOWN else f"{text} MACs"


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss."""
    if seconds is None or not is_known(seconds):
        return UNKNOWN
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in [0, 1] in percent: 18.8 %."""
    return UNKNOWN if fraction is None or not is_known(fraction) else f"{100 * fraction:.{digits}f} %"


def decimal(value: float | None) -> str:
    """A number of about 1 to 1,000 (perplexities, bits per byte): 2.155, 23.41, 4,096.3."""
    if value is None or not is_known(value):
        return UNKNOWN
    return f"{value:,.{3 if abs(value) < 10 else 2 if abs(value) < 1000 else 1}f}"


def scientific(value: float | None) -> str:
    """Three significant digits in scientific notation (learning rates, errors): 9.80e-04."""
    return UNKNOWN if value is None or not is_known(value) else f"{value:.2e}"
