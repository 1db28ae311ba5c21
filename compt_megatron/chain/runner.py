"""The life cycle of a chain: for every link grow -> train -> evaluate -> export, recorded in the ledger.

A finished link is skipped, an interrupted one goes on from its newest checkpoint. Every rank runs this code; rank 0
alone writes the ledger and the checkpoints' first weights, and what it decides is shared with the others.
"""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from compt_megatron import __version__
from compt_megatron.chain.claim import RunFolder
from compt_megatron.chain.evaluation import Evaluator
from compt_megatron.chain.export import export
from compt_megatron.chain.harness import Harness, MemberTasks
from compt_megatron.chain.initial import write_initial
from compt_megatron.chain.ledger import Entry, Ledger
from compt_megatron.chain.member import Member, control_members, link_members
from compt_megatron.chain.planner import check_recipe
from compt_megatron.chain.progress import Position, Progress
from compt_megatron.chain.run_tokenizer import with_companions
from compt_megatron.chain.stop_flag import StopFlag
from compt_megatron.chain.text import open_text, open_training_text
from compt_megatron.chain.train import Watch, train_member
from compt_megatron.checkpoint.api import check
from compt_megatron.checkpoint.commit import read_pointer
from compt_megatron.checkpoint.digest import weight_hash
from compt_megatron.checkpoint.formats import open_reader
from compt_megatron.data.source import ShardSource
from compt_megatron.data.text.source import TextSource
from compt_megatron.engine.build import check_machine
from compt_megatron.engine.runtime import Runtime
from compt_megatron.errors import UserError
from compt_megatron.observe import numbers
from compt_megatron.observe.console import Console
from compt_megatron.observe.metrics import RunLog
from compt_megatron.recipe.load import resolved
from compt_megatron.recipe.schema import Recipe

_PACKAGES = ("torch", "deepspeed", "megatron-core", "open_clip_torch", "numpy", "transformers", "lm_eval")


def run(recipe: Recipe, run_dir: Path, link: str | None = None, resume: str = "auto") -> Ledger:
    """Run the chain of `recipe` in `run_dir`, or only the link (or control) named `link`. Collective.

    `resume`: `auto` goes on where the run folder stands, `none` starts anew in an empty folder, a path starts the
    first unfinished link from that checkpoint. Raises UserError for what the user can mend (nothing is written before
    the whole recipe has been checked, and what was is removed while there is no checkpoint to go on from) and
    StopRequested after a signal, with a checkpoint written.
    """
    runtime = Runtime.start()
    run_dir = Path(run_dir)
    links = link_members(recipe, None)
    members = [*links, *control_members(recipe, links)]
    check_recipe(recipe, world=runtime.world)
    if link is not None and link not in [member.name for member in members]:
        raise UserError(f"--link {link}: the recipe has no such link; it has {', '.join(m.name for m in members)}")
    stop = StopFlag()
    harness = Harness(runtime, stop)
    with stop.listening():
        folder = RunFolder(run_dir) if runtime.is_main else None
        try:
            return _Chain(recipe, run_dir, members, runtime, stop, resume, folder, harness).run(link)
        except (UserError, OSError):
            if folder is not None:
                folder.undo()
            raise
        finally:
            harness.end()
            if folder is not None:
                folder.release()


class _Chain:
    """One run folder and the members that are trained in it."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, members: list[Member], runtime: Runtime, stop: StopFlag, resume: str,
        folder: RunFolder | None, harness: Harness,
    ) -> None:  # fmt: skip
        self.recipe, self.run_dir, self.members = recipe, run_dir, members
        self.runtime, self.stop, self.harness = runtime, stop, harness
        self.resume_from = None if resume in ("auto", "none") else Path(resume)
        if self.resume_from is not None and not self.resume_from.exists():
            raise UserError(f"--resume {resume}: no such checkpoint; name one, or use auto or none")
        known = None
        with runtime.main_first():
            if folder is not None:
                known = self._open_ledger(resume, folder)
                self._check_inputs(known)
        self.ledger: Ledger = runtime.exchange(known)[0]
        self.console = Console(enabled=runtime.is_main, total_links=len(members))
        harness.check([member for member in members if self.ledger.entry(member.name).state != "done"])

    def run(self, only: str | None) -> Ledger:
        self._check_machine(only)
        with RunLog(self.run_dir, self.runtime.rank, self.recipe.report.tensorboard) as log:
            try:
                for member in self.members:
                    if only in (None, member.name):
                        self._run_member(member, log)
            finally:
                self.console.end_link()
        if self.resume_from is not None:
            raise UserError(f"--resume {self.resume_from}: nothing was left to train from it; use another --run-dir")
        if self.runtime.is_main:
            self.console.table(asdict(self.ledger))
        return self.ledger

    def _check_machine(self, only: str | None) -> None:
        """What members that are still to be trained need of every rank's machine. Collective."""
        problem = None
        for member in self.members:
            if only in (None, member.name) and member.train and self.ledger.entry(member.name).state != "done":
                try:
                    check_machine(member.settings, self.runtime.device)
                except UserError as error:
                    problem = UserError(f"{member.name}: {error}")
                    break
        self.runtime.raise_any(problem)

    # -- the ledger --------------------------------------------------------------------------------------------------

    def _open_ledger(self, resume: str, folder: RunFolder) -> Ledger:
        """Rank 0: the ledger of the run folder, checked against the recipe, or a new one."""
        known = Ledger.load(self.run_dir)
        if known is not None and resume == "none":
            raise UserError(f"{self.run_dir}: already holds a run; --resume none needs a new --run-dir (or remove it)")
        folder.claim(known is not None)
        known = Ledger.load(self.run_dir)  # again: now that nobody else can write it
        if known is None:
            known = Ledger(self.recipe.name, "recipe.yaml", self.recipe.digest)
        self._match(known)
        known.command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        known.versions = _versions()
        known.machine = {
            "cpus": torch.get_num_threads(),
            "device": str(self.runtime.device),
            "world": self.runtime.world,
        }
        known.save(self.run_dir)
        (self.run_dir / "recipe.yaml").write_text(resolved(self.recipe), encoding="utf-8")
        return known

    def _check_inputs(self, ledger: Ledger) -> None:
        """Rank 0: open every shard and `init` checkpoint of what is still to be trained, so that damage is known now
        and not after hours. Counts are kept in RUN/cache."""
        sizes: dict[str, int] = {}
        for member in self.members:
            state = ledger.entry(member.name).state
            if state == "done":
                continue
            if member.init is not None and state == "pending":
                check(member.init, member.spec)
            data = member.settings.data
            if member.spec.is_language_model:
                if member.train:
                    _note_tokenizer(ledger.entry(member.name), open_training_text(member))
                for name in data.eval:
                    open_text(member.spec, name, data.tokenizer)
                continue
            train = [(data.shards, data.batch_size)] if member.train else []
            for source, least in (*train, *((source, 1) for source in data.eval)):
                key = str(source)
                if key not in sizes:
                    sizes[key] = ShardSource.open(source, cache_dir=self.run_dir / "cache").samples
                if sizes[key] < least:
                    mend = "lower data.batch_size or add data" if least > 1 else "add data or correct data.eval"
                    raise UserError(f"{member.name}: {key} has {sizes[key]} samples, {least} are needed; {mend}")

    def _match(self, ledger: Ledger) -> None:
        """Give every member its entry; refuse a recipe that would train another model under a started one's name, or
        that no longer has one that was started."""
        known = {entry.name: entry for entry in (*ledger.links, *ledger.controls)}
        for name in known.keys() - {member.name for member in self.members}:
            if known[name].state != "pending":
                raise UserError(
                    f"{self.run_dir}: {name!r} was started here, but the recipe has no link of that name; "
                    "use another --run-dir, or put the recipe back (RUN/recipe.yaml has it)"
                )
        entries = []
        for member in self.members:
            entry = known.get(member.name)
            same = entry is not None and (entry.identity, entry.parent) == (member.identity, member.parent)
            if entry is not None and entry.state != "pending" and not same:
                raise UserError(
                    f"{self.run_dir}: link {member.name!r} was started with other settings than the recipe has now; "
                    "use another --run-dir, or put the recipe back (RUN/recipe.yaml has it)"
                )
            if entry is None or entry.state == "pending":
                entry = Entry(member.name, member.spec.name, kind=member.kind, parent=member.parent)  # type: ignore[arg-type]
                entry.identity, entry.seed, entry.parameters = member.identity, member.settings.seed, member.spec.numel
            entries.append(entry)
        ledger.links = [entry for entry in entries if entry.kind == "link"]
        ledger.controls = [entry for entry in entries if entry.kind == "control"]

    def _save_ledger(self) -> None:
        if self.runtime.is_main:
            self.ledger.save(self.run_dir)

    # -- one member --------------------------------------------------------------------------------------------------

    def _run_member(self, member: Member, log: RunLog) -> None:
        entry = self.ledger.entry(member.name)
        if entry.state == "done":
            self.console.message(f"{member.name}: done already ({entry.steps} steps)")
            return
        parent = self._parent_checkpoint(member)
        if member.kind == "link":
            entry.chain_macs_before = self._chain_macs(member.name)
        elif member.compute is not None:
            entry.budget_macs = self._budget(member)
        if entry.state == "pending":
            self._start(member, entry, parent)
        if entry.state in ("started", "training"):
            self._train(member, entry, parent, log)
        self._finish(member, entry, log)

    def _parent_checkpoint(self, member: Member) -> Path | None:
        if member.parent is None:
            return None
        parent = self.ledger.entry(member.parent)
        if parent.checkpoint is None or parent.state not in ("trained", "done"):
            raise UserError(
                f"link {member.name!r} grows from {member.parent!r}, which is not trained yet; train that first"
            )
        return self.run_dir / parent.checkpoint

    def _chain_macs(self, before: str) -> float:
        """What the links before `before` have cost."""
        names = [entry.name for entry in self.ledger.links]
        return sum(entry.macs.get("total", 0.0) for entry in self.ledger.links[: names.index(before)])

    def _budget(self, member: Member) -> float:
        """MACs that a control may spend: a number, or what the chain spent up to and with the control's link."""
        if member.compute != "chain":
            return float(member.compute or 0)
        link = next(control.link for control in self.recipe.controls if control.name == member.name)
        entry = self.ledger.entry(link)
        if entry.state not in ("trained", "done"):
            raise UserError(f"control {member.name!r} spends what the chain spent, but {link!r} is not trained yet")
        return self._chain_macs(link) + entry.macs["total"]

    def _start(self, member: Member, entry: Entry, parent: Path | None) -> None:
        target = self.run_dir / member.name / "initial"
        with self.runtime.main_first():
            if self.runtime.is_main:
                entry.certificate = write_initial(member, parent, target)
        entry.certificate = self.runtime.exchange(entry.certificate)[0]  # every rank's optimizer asks it for rates
        if entry.certificate is not None:
            self.console.grow(member.name, member.parent or "", entry.certificate)
        else:
            self.console.message(
                f"{member.name}: {numbers.human(entry.parameters)} parameters, {member.init or 'fresh weights'}"
            )
        entry.initial, entry.state = str(target.relative_to(self.run_dir)), "started"
        self._save_ledger()

    def _train(self, member: Member, entry: Entry, parent: Path | None, log: RunLog) -> None:
        evaluator = Evaluator(member, self.run_dir, self.runtime, log, self.console)
        tasks = self._tasks(member, entry, log)
        watch = Watch(log, self.console, self.recipe.checkpoint, self.recipe.report, evaluator, tasks, self.stop)
        entry.state = "training"
        self._save_ledger()
        if member.train:
            evaluator.prepare()
            resume_from, self.resume_from = self.resume_from, None
            progress = train_member(member, entry, self.run_dir, parent, self.runtime, watch, resume_from)
            _record(entry, progress)
            checkpoint = read_pointer(self.run_dir / member.name / "checkpoints")
            assert checkpoint is not None, "training ends with a checkpoint"
            entry.checkpoint = str(checkpoint.relative_to(self.run_dir))
        else:
            entry.checkpoint = entry.initial
        entry.evaluation = evaluator.latest()
        entry.state = "trained"
        self._save_ledger()

    def _finish(self, member: Member, entry: Entry, log: RunLog) -> None:
        checkpoint, target = self.run_dir / (entry.checkpoint or ""), self.run_dir / member.name / "export"
        if member.settings.evaluate.at_end and not entry.evaluation and member.settings.data.eval:
            evaluator = Evaluator(member, self.run_dir, self.runtime, log, self.console)
            evaluator.checkpoint(checkpoint, _end(entry, checkpoint))
            entry.evaluation = evaluator.latest()
        with self.runtime.main_first():
            if self.runtime.is_main:
                reader = open_reader(checkpoint)
                entry.weight_hash = weight_hash(reader)
                reader.close()
                data, files = member.settings.data, {}
                if member.spec.is_language_model:
                    source = open_text(member.spec, data.train, data.tokenizer)
                    _note_tokenizer(entry, source)
                    files = with_companions(source.tokenizer)
                export(checkpoint, target, overwrite=True, attachments=files)
                entry.export = str(target.relative_to(self.run_dir))
                self.console.export(member.name, target)
        tasks = self._tasks(member, entry, log)
        if tasks.due(entry.steps, last=True):
            tasks.run(_end(entry, checkpoint), export=target)
        entry.tasks = tasks.latest()
        entry.state = "done"
        self._save_ledger()

    def _tasks(self, member: Member, entry: Entry, log: RunLog) -> MemberTasks:
        folder = self.run_dir / member.name
        return MemberTasks(member, folder, self.harness, self.runtime, log, self.console, entry.tokenizer)


def _note_tokenizer(entry: Entry, source: TextSource) -> None:
    entry.tokenizer = None if source.tokenizer is None else str(source.tokenizer.resolve())


def _end(entry: Entry, checkpoint: Path) -> Position:
    """Where the training of a member ended."""
    reader = open_reader(checkpoint)
    try:
        train = reader.metadata().get("train") or {}
    finally:
        reader.close()
    macs = entry.chain_macs_before + entry.macs.get("total", 0.0)
    return Position(entry.steps, train.get("epoch", 0.0), entry.samples, macs)


def _record(entry: Entry, progress: Progress) -> None:
    entry.steps = entry.total_steps = progress.total_steps
    entry.samples, entry.macs = progress.samples, progress.macs
    entry.wall_s, entry.cpu_s = progress.wall_s, progress.cpu_s
    entry.align_at_step0, entry.final_loss = progress.align_at_step0, progress.loss
    entry.skipped_steps = progress.skipped


def _versions() -> dict[str, str]:
    versions = {"compt_megatron": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
