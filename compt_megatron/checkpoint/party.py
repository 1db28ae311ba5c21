"""The ranks that write one checkpoint together: they succeed together or raise together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compt_megatron.checkpoint.contract import Exchange
from compt_megatron.errors import UserError


class Party:
    """Collective steps of `world` ranks over an all-gather of objects (None for one process)."""

    def __init__(self, rank: int, world: int, exchange: Exchange | None) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        assert world == 1 or exchange is not None, "several ranks need an exchange function"
        self.rank, self.world, self._exchange = rank, world, exchange
        self._over = False  # a step failed: all ranks know, and nobody waits for another one

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> list[Any]:
        """Call `make` on every rank and return all results by rank. If it raises anywhere, every rank raises."""
        value, error = None, None
        try:
            value = make()
        except Exception as raised:  # whatever it is, the others must hear of it before it travels on
            error = raised
        if self.world == 1:
            if error is not None:
                raise error
            return [value]
        assert self._exchange is not None
        # A failure travels as text: an exception of one rank need not be picklable.
        failure = None if error is None else (isinstance(error, UserError), str(error) or repr(error))
        rows = self._exchange((value, failure))
        self._over = any(other is not None for _, other in rows)
        if error is not None:
            raise error
        for rank, (_, other) in enumerate(rows):
            if other is not None:
                user, text = other
                raise UserError(text) if user else RuntimeError(f"rank {rank} failed writing the checkpoint: {text}")
        return [row[0] for row in rows]

    def lead(self, act: Callable[[], Any]) -> Any:
        """Let rank 0 act while the others wait; all get its result, or raise if it raised."""
        return self.share(lambda: act() if self.leads else None)[0]

    def desert(self, reason: str) -> None:
        """Tell the others, who wait in their next collective step, that this rank gave up (unless they know)."""
        if self.world > 1 and self._exchange is not None and not self._over:
            self._over = True
            self._exchange((None, (False, reason)))
