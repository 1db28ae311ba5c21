"""What a run shows while it runs and afterwards: metrics files, throughput, the console, the family report."""

from __future__ import annotations
