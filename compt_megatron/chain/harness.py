"""lm-eval in a chain: on the export of a trained link, and on one made of a checkpoint while the link trains.

Rank 0 has lm-eval run in a process of its own; the other ranks wait with it in short collective steps, so that it may
take longer than a process group waits. A request to stop ends it at once, and the run started again takes it up.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compt_megatron.chain.harness_process import HarnessProcess
from compt_megatron.chain.member import Member
from compt_megatron.chain.progress import Position
from compt_megatron.chain.record import EvaluationRecord
from compt_megatron.chain.run_tokenizer import with_companions
from compt_megatron.chain.stop_flag import StopFlag
from compt_megatron.engine.runtime import Runtime
from compt_megatron.errors import StopRequested, UserError, WorkerLost
from compt_megatron.observe.console import Console
from compt_megatron.observe.metrics import RunLog

_BEAT_S = 1.0  # how long one step of waiting is
_SCRATCH, _LOG = "harness", "harness.log"  # in a member's folder: the export of a checkpoint; what lm-eval said last
_ASKED = {"tasks", "include", "limit", "shots"}  # what results depend on


class Harness:
    """The run's lm-eval. Rank 0 has the process, which starts when it is first needed."""

    def __init__(self, runtime: Runtime, stop: StopFlag) -> None:
        self._runtime, self._stop, self._process = runtime, stop, HarnessProcess()

    def check(self, members: Sequence[Member]) -> None:
        """Load the tasks of all members, with their data. Collective. Raises UserError where one cannot be had."""
        for member in members:
            if (harness := member.settings.evaluate.harness) is not None:
                try:
                    self.carry_out(settings=harness.model_dump())
                except UserError as error:
                    raise UserError(f"{member.name}: evaluate.harness: {error}") from error

    def carry_out(self, **request: Any) -> Any:
        """What the process answers (see `harness_process.child`), on every rank. Collective. Raises what it raised, and
        StopRequested."""
        if self._runtime.is_main:
            self._process.ask(**request)
        while True:
            answered = self._runtime.is_main and self._process.answered(_BEAT_S)
            state = self._runtime.max(2 if self._stop.requested else 1 if answered else 0)
            if state == 2:
                self.end()
                raise StopRequested("stopped while lm-eval was at work; give the same command again to go on")
            if state == 1:
                break
        outcome = None
        if self._runtime.is_main:
            try:
                outcome = self._process.answer()
            except (UserError, WorkerLost, RuntimeError) as error:
                outcome = error
        outcome = self._runtime.exchange(outcome)[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def end(self) -> None:
        """End the process, which frees its memory; it starts again when it is needed."""
        self._process.end()


class MemberTasks:
    """lm-eval's tasks of one member: when they are due, and their results in its record."""

    def __init__(
        self, member: Member, folder: Path, harness: Harness, runtime: Runtime, log: RunLog, console: Console,
        tokenizer: str | None,
    ) -> None:  # fmt: skip
        """`folder`: the member's in the run; `tokenizer`: the tokenizer.json of its data."""
        self._member, self._folder, self._harness, self._runtime = member, folder, harness, runtime
        self._log, self._console = log, console
        self._settings = member.settings.evaluate.harness
        self._record = EvaluationRecord(folder)
        self._attachments = with_companions(Path(tokenizer) if tokenizer else None)
        self._clear()

    def due(self, step: int, last: bool = False) -> bool:
        """Whether a step's tasks are still to be run: those of the last step (`last`) on the export, those of
        others on their checkpoint. Collective."""
        harness, evaluate = self._settings, self._member.settings.evaluate
        if harness is None:
            return False
        wanted = evaluate.at_end if last else bool(harness.every_steps) and step % (harness.every_steps or 1) == 0
        if not wanted:
            return False
        rows = self._record.rows() if self._runtime.is_main else []
        asked = harness.model_dump(include=_ASKED)
        known = any(row["step"] == step and row.get("asked") == asked for row in rows)
        return not self._runtime.exchange(known)[0]

    def run(self, position: Position, *, checkpoint: Path | None = None, export: Path | None = None) -> None:
        """Run the tasks on an export, or on one made of a checkpoint and removed afterwards, and record the results.
        Collective. Raises UserError, WorkerLost, and StopRequested."""
        assert self._settings is not None
        device = self._runtime.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self._console.message(f"{self._member.name}: step {position.step:,}: lm-eval on "
                              f"{', '.join(self._settings.tasks)}")  # fmt: skip
        try:
            found = self._harness.carry_out(
                settings=self._settings.model_dump(),
                folder=export or self._folder / _SCRATCH,
                checkpoint=checkpoint,
                attachments=self._attachments,
                device=str(device),
                log=self._folder / _LOG,
            )
        finally:
            if device.type == "cuda":
                self._harness.end()  # CUDA keeps memory of a process as long as it lives
            self._clear()
        if self._runtime.is_main:
            self._record.add(position, tasks=found, asked=self._settings.model_dump(include=_ASKED))
            self._console.tasks(self._member.name, position.step, found)
            self._log.evaluation(self._member.name, position.step, found)

    def latest(self) -> dict[str, dict[str, float]]:
        """The newest results, empty where there are none. Collective."""
        found = self._record.latest("tasks") if self._runtime.is_main else {}
        return dict(self._runtime.exchange(found)[0])

    def _clear(self) -> None:
        """Remove the export of a checkpoint, a killed run's too."""
        if self._runtime.is_main and (self._folder / _SCRATCH).exists():
            shutil.rmtree(self._folder / _SCRATCH)
        partial = self._folder / f"{_SCRATCH}.partial"
        if self._runtime.is_main and partial.exists():
            shutil.rmtree(partial)
