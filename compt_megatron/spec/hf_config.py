"""Reading Hugging Face's `config.json`: fields with their types and limits, rotary positions, what makes a model."""

from __future__ import annotations

from typing import Any

from compt_megatron.errors import UserError
from compt_megatron.spec.config_values import finite_number, positive_integer
from compt_megatron.spec.table import Rope

_LAYERS = ("num_hidden_layers", "n_layer")


class HfConfig:
    """A config.json with checked access; `name` is used in messages. Errors are UserErrors that name it."""

    def __init__(self, config: dict[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def integer(self, field: str, default: int | None = None) -> int:
        """A positive integer; null counts as absent."""
        value = self.config.get(field)
        return positive_integer(default if value is None else value, field, self.name, layers=field in _LAYERS)

    def number(self, field: str, default: float | None = None, above: float = 0.0) -> float:
        """A finite number above `above`."""
        value = self.config.get(field)
        return finite_number(default if value is None else value, f"{self.name}: '{field}'", above)

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{self.name}: '{field}' must be true or false, not {value!r}")
        return value

    def text(self, field: str, default: str) -> str:
        value = self.config.get(field)
        value = default if value is None else value
        if not isinstance(value, str):
            raise UserError(f"{self.name}: '{field}' must be a string, not {value!r}")
        return value

    def only(self, field: str, *allowed: Any) -> None:
        """Refuse a field that changes the model's function and has another value than those supported."""
        value = self.config.get(field)
        if value is not None and value not in allowed:
            raise UserError(f"{self.name}: {field}={value!r} is not supported; {self.name} must have {allowed[0]!r}")

    def divides(self, small: str, large: str, low: int, high: int) -> None:
        if high % low:
            raise UserError(
                f"{self.name}: '{large}' {high} is not divisible by '{small}' {low}, which Hugging Face demands; "
                "change one of them"
            )

    def rope(self) -> Rope:
        """Rotary positions, in the spelling of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        given: dict[str, Any] = {}
        for field in ("rope_scaling", "rope_parameters"):
            value = self.config.get(field)
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{self.name}: '{field}' must be a JSON object, not {value!r}")
            given.update(value or {})
        kind = given.pop("rope_type", given.pop("type", None)) or "default"
        given.pop("type", None)
        theta = given.pop("rope_theta", None) or self.config.get("rope_theta") or 10000.0
        theta = finite_number(theta, f"{self.name}: 'rope_theta'", above=0.0)
        if any(isinstance(value, dict) for value in given.values()):
            raise UserError(f"{self.name}: rotary positions that differ by kind of layer are not supported")
        if given.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
            raise UserError(f"{self.name}: 'partial_rotary_factor' is not supported; the whole head must rotate")
        self.only("partial_rotary_factor", 1, 1.0)
        scaling = sorted(
            (key, tuple(value) if isinstance(value, list) else value)
            for key, value in given.items()
            if kind != "default" and value is not None
        )
        return Rope(theta, str(kind), tuple(scaling))


def check_plain(config: HfConfig) -> None:
    """Refuse what no language model here supports."""
    if config.config.get("quantization_config"):
        raise UserError(f"{config.name}: quantised weights cannot be grown; use the original, unquantised checkpoint")
    config.only("add_cross_attention", False)
    config.only("is_encoder_decoder", False)
