"""Rotary positions (RoFormer, arXiv 2104.09864) and their scalings, number for number as transformers computes them."""

from __future__ import annotations

from math import ceil, floor, log, pi
from typing import Any

import torch
from torch import Tensor

from compt_megatron.errors import UserError
from compt_megatron.spec.table import ModelSpec

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


class Rotary:
    """The angles by which a language model turns queries and keys, and what its scaling does to attention.

    `attention`: a factor on the attention scores (YaRN's, arXiv 2309.00071, equation 22: it is that of query and of
    key). Raises UserError for a scaling that is not supported, or one that lacks a number.
    """

    def __init__(self, spec: ModelSpec) -> None:
        tower = spec.towers["text"]
        assert tower.rope is not None
        self._rope, self._size, self._longest, self._name = tower.rope, tower.head_dim, tower.tokens, spec.name
        if tower.rope.kind not in SCALINGS:
            raise UserError(
                f"{spec.name}: rotary scaling '{tower.rope.kind}' is not supported in training; "
                f"those supported: {', '.join(SCALINGS)}"
            )
        self._numbers: dict[str, Any] = dict(tower.rope.scaling)
        outside = spec.config.get("original_max_position_embeddings")  # it wins over the one among the numbers
        self._original = outside or self._numbers.get("original_max_position_embeddings") or tower.tokens
        self.attention = self._yarn_attention() ** 2 if tower.rope.kind == "yarn" else 1.0
        self._kept: tuple[int, torch.device, Tensor] | None = None
        self._frequencies(self._longest)  # so that a missing number is reported now

    def angles(self, length: int, device: torch.device) -> Tensor:
        """fp32 [length, 1, 1, head_dim], the halves of the last dimension alike; in radians. The last table is kept."""
        if self._kept is None or self._kept[:2] != (length, device):
            with torch.inference_mode(False), torch.no_grad():  # training may use what an evaluation has made
                frequencies = self._frequencies(length).to(device)
                half = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
                self._kept = length, device, torch.cat([half, half], dim=-1)[:, None, None, :]
        return self._kept[2]

    def _frequencies(self, length: int) -> Tensor:
        """fp32 [head_dim / 2], radians a token."""
        kind = self._rope.kind
        if kind == "linear":
            return self._plain(self._rope.theta) / self._number("factor")
        if kind == "dynamic":
            return self._dynamic(length)
        if kind == "llama3":
            return self._llama3()
        return self._yarn() if kind == "yarn" else self._plain(self._rope.theta)

    def _plain(self, theta: float) -> Tensor:
        return 1.0 / self._powers(theta)

    def _powers(self, theta: float) -> Tensor:
        powers: Tensor = theta ** (torch.arange(0, self._size, 2, dtype=torch.float32, device="cpu") / self._size)
        return powers

    def _dynamic(self, length: int) -> Tensor:
        """NTK-aware: sequences longer than the positions of the config turn more slowly."""
        factor, longest, size = self._number("factor"), self._longest, self._size
        stretched = factor * max(length, longest) / longest - (factor - 1)
        return self._plain(self._rope.theta * stretched ** (size / (size - 2)))

    def _llama3(self) -> Tensor:
        """Llama 3.1's: long waves are stretched, short ones kept, those between interpolated."""
        factor, low, high = (self._number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        plain = self._plain(self._rope.theta)
        wave = 2 * pi / plain
        scaled = torch.where(wave > self._original / low, plain / factor, plain)
        smooth = (self._original / wave - low) / (high - low)
        between = ~(wave < self._original / high) & ~(wave > self._original / low)
        return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)

    def _yarn(self) -> Tensor:
        fast, slow = self._numbers.get("beta_fast") or 32, self._numbers.get("beta_slow") or 1
        ends = [self._turns_at(fast), self._turns_at(slow)]
        if self._numbers.get("truncate", True):
            ends = [floor(ends[0]), ceil(ends[1])]
        first, last = max(ends[0], 0), min(ends[1], self._size - 1)
        last += 0.001 if first == last else 0.0
        ramp = ((torch.arange(self._size // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
        powers, kept = self._powers(self._rope.theta), 1 - ramp
        return 1.0 / (self._yarn_factor() * powers) * (1 - kept) + 1.0 / powers * kept

    def _turns_at(self, turns: float) -> float:
        """The dimension whose wave makes so many turns over the original positions."""
        return (self._size * log(self._original / (turns * 2 * pi))) / (2 * log(self._rope.theta))

    def _yarn_factor(self) -> float:
        factor = self._numbers.get("factor")
        return float(self._longest / self._original if factor is None else factor)

    def _yarn_attention(self) -> float:
        given = self._numbers.get("attention_factor")
        if given is not None:
            return float(given)
        factor = self._yarn_factor()
        scale, all_dims = self._numbers.get("mscale"), self._numbers.get("mscale_all_dim")
        if scale and all_dims:
            return _concentration(factor, scale) / _concentration(factor, all_dims)
        return _concentration(factor, 1.0)

    def _number(self, name: str) -> float:
        if name not in self._numbers:
            raise UserError(f"{self._name}: rotary scaling '{self._rope.kind}' needs '{name}' in rope_scaling; add it")
        return float(self._numbers[name])


def _concentration(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * log(factor) + 1.0
