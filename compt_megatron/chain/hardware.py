"""The machine that times are predicted for. Every number is an assumption that `compt plan` prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """A cluster of nodes with 8 GPUs, by default of 80 GB (H100 SXM: NVLink 4, one 400 Gbit/s network port a GPU).

    `peak_bf16`, `peak_fp32`: dense FLOP/s of the data sheet; `sustained`: the share of it that large products reach;
    `half_tokens`: tokens of a micro-batch at which products reach half of that, T / (T + half_tokens);
    `nvlink`, `network`: bytes/s that a GPU sends within its node and between nodes, as collectives reach them;
    `latency`: seconds of one collective or transfer; `launch`: seconds below which no block's forward pass comes,
    however small (its kernels are started one by one); `usable`: share of the memory that a plan may fill.
    """

    memory: float = 80e9
    per_node: int = 8
    peak_bf16: float = 989e12
    peak_fp32: float = 67e12
    sustained: float = 0.5
    half_tokens: int = 512
    nvlink: float = 360e9
    network: float = 40e9
    latency: float = 20e-6
    launch: float = 150e-6
    usable: float = 0.9

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of one GPU."""
        return self.peak_bf16 if precision == "bf16" else self.peak_fp32

    def rate(self, precision: str, tokens: float) -> float:
        """FLOP/s that products with so many tokens reach on one GPU."""
        return self.peak(precision) * self.sustained * tokens / (tokens + self.half_tokens)

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes/s between `ranks` ranks that are `stride` apart: the network's where they are not all on one node."""
        return self.nvlink if ranks * stride <= self.per_node else self.network
