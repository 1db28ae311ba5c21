"""The training loop of one link, from its first weights (or its last checkpoint) to its last step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compt_megatron.align.alignment import Alignment
from compt_megatron.align.distillation import Distillation
from compt_megatron.align.projection import Projections
from compt_megatron.align.teacher import Teacher
from compt_megatron.chain.harness import MemberTasks
from compt_megatron.chain.ledger import Entry
from compt_megatron.chain.link_checkpoints import recorded_state, remove_leftovers, save
from compt_megatron.chain.member import Member
from compt_megatron.chain.progress import Clock, Position, Progress, total_steps
from compt_megatron.chain.rates import grown_factors
from compt_megatron.chain.record import EvaluationRecord
from compt_megatron.chain.stop_flag import StopFlag
from compt_megatron.chain.text import open_training_text, vocabulary
from compt_megatron.checkpoint.commit import read_pointer
from compt_megatron.data.loader import TrainLoader
from compt_megatron.data.source import ShardSource
from compt_megatron.data.text.loader import TokenLoader
from compt_megatron.data.tokenizer import build_tokenizer
from compt_megatron.data.transforms import train_transform
from compt_megatron.engine.build import engine_class
from compt_megatron.engine.contract import AnyBatch
from compt_megatron.engine.runtime import Runtime
from compt_megatron.engine.topology import Topology
from compt_megatron.engine.training_step import TrainingEngine
from compt_megatron.errors import StopRequested, UserError
from compt_megatron.models.part import ModelPart
from compt_megatron.objectives.registry import build_objective
from compt_megatron.observe.console import Console
from compt_megatron.observe.metrics import RunLog
from compt_megatron.observe.throughput import Throughput, peak_flops
from compt_megatron.recipe.sections import CheckpointSettings, ReportSettings
from compt_megatron.spec.huggingface_names import head_key

# What an exactly grown model may differ from its teacher at step 0: the squared distance of unit feature vectors.
_ALIGN_NOISE = {"fp32": 1e-6, "bf16": 1e-2}


@dataclass
class Watch:
    """What the loop reports to, and what it asks: the run's log, its console, evaluations, a request to stop."""

    log: RunLog
    console: Console
    checkpoint: CheckpointSettings
    report: ReportSettings
    evaluate: Callable[[TrainingEngine, Position], None]
    tasks: MemberTasks
    stop: StopFlag


Loader = TrainLoader | TokenLoader


def open_loader(
    member: Member, runtime: Runtime, topology: Topology, cache_dir: Path, state: dict[str, Any] | None = None
) -> Loader:
    """The training batches of a member from where `state`, what its checkpoint records of the training, left off.

    Rank 0 counts shards of unknown size, and makes the built-in text, first. All ranks of one copy of the model load
    the same rows.
    """
    open_one = _open_token_loader if member.spec.is_language_model else _open_train_loader
    return open_one(member, runtime, topology, cache_dir, state or {})


def _open_token_loader(
    member: Member, runtime: Runtime, topology: Topology, cache_dir: Path, state: dict[str, Any]
) -> TokenLoader:
    data = member.settings.data
    with runtime.main_first():
        source = open_training_text(member)
    return TokenLoader(
        source,
        length=member.length,
        batch_size=data.batch_size,
        seed=member.settings.seed,
        rank=topology.data_rank,
        world=topology.data,
        workers=data.workers,
        start_step=state.get("step", 0),
        start_sample=state.get("samples"),
        vocab_size=vocabulary(member.spec),
        mask_document_starts=data.mask_document_starts,
        cache_dir=cache_dir,
    )


def _open_train_loader(
    member: Member, runtime: Runtime, topology: Topology, cache_dir: Path, state: dict[str, Any]
) -> TrainLoader:
    data = member.settings.data
    with runtime.main_first():
        source = ShardSource.open(data.shards, cache_dir=cache_dir)
    tokenizer = build_tokenizer(member.spec.config) if "text" in member.spec.towers else None
    return TrainLoader(
        source,
        tokenizer=tokenizer,
        transform=train_transform(member.spec.config, dict(data.augment)),
        batch_size=data.batch_size,
        captions=data.captions,
        seed=member.settings.seed,
        streams=state.get("streams") or data.streams,
        rank=topology.data_rank,
        world=topology.data,
        workers=data.workers,
        start_step=state.get("step", 0),
        skip_budget=data.skip_budget,
        shuffle_window=data.shuffle_window,
        cache=data.cache,
        caption_keys=data.caption_fields or None,
        caption_member=data.caption_key,
    )


def train_member(
    member: Member, entry: Entry, run_dir: Path, parent_checkpoint: Path | None, runtime: Runtime, watch: Watch,
    resume_from: Path | None = None,
) -> Progress:  # fmt: skip
    """Train to the last step, resuming from the member's newest checkpoint. Collective.

    Returns with the last checkpoint written under RUN/<member>/checkpoints. Raises StopRequested after a checkpoint
    when a signal asked to stop, and UserError for what the user can mend.
    """
    folder = run_dir / member.name / "checkpoints"
    remove_leftovers(folder, runtime)
    newest = resume_from or read_pointer(folder)
    start_from = newest or run_dir / (entry.initial or "")
    train_state = recorded_state(newest, member) if newest else {}
    topology = Topology.start(member.settings.parallel)
    loader = open_loader(member, runtime, topology, run_dir / "cache", train_state)
    samples = member.settings.data.samples
    steps_per_epoch = max(1, samples // loader.batch_size) if samples else loader.steps_per_epoch
    steps = total_steps(member, steps_per_epoch, entry.budget_macs)
    teacher, alignment, distillation, projections = _teaching(member, parent_checkpoint, steps, runtime, topology)
    macs = member.macs_per_sample(teacher.spec if teacher else None)
    progress = Progress.resumed(train_state, steps, steps_per_epoch, loader.streams, macs)
    engine = engine_class(member.settings.parallel)(
        member.spec,
        member.settings,
        build_objective(member.settings.objective.name, **member.settings.objective.options()),
        runtime,
        total_steps=progress.total_steps,
        teacher=teacher,
        alignment=alignment,
        distillation=distillation,
        projections=projections,
        factors=grown_factors(member, entry.certificate),
    )
    try:
        grown = member.grow is not None and member.grow.moments == "grow"
        lineage = engine.load(start_from, optimizer=newest is not None or grown).get("lineage", [])
        watch.log.rewind(member.name, engine.global_step)
        if runtime.is_main:
            EvaluationRecord(run_dir / member.name).rewind(engine.global_step)
        if newest is not None and engine.global_step < progress.total_steps and watch.tasks.due(engine.global_step):
            watch.tasks.run(progress.position(engine.global_step, entry), checkpoint=newest)
        watch.console.message(f"{member.name}: {_layout_line(member, topology)}; {engine.implementation}")
        _loop(engine, loader, member, entry, progress, watch, folder, lineage, runtime)
    finally:
        loader.close()
        engine.close()
    return progress


def _loop(
    engine: TrainingEngine, loader: Loader, member: Member, entry: Entry, progress: Progress, watch: Watch,
    folder: Path, lineage: list[dict[str, Any]], runtime: Runtime,
) -> None:  # fmt: skip
    save_every = watch.checkpoint.every_steps or progress.steps_per_epoch
    evaluate_every = member.settings.evaluate.every_epochs
    evaluate_steps = max(1, round(evaluate_every * progress.steps_per_epoch)) if evaluate_every else 0
    throughput = Throughput(sum(progress.macs_per_sample.values()), _peak(runtime, member))
    clock, cpu_clock = Clock(time.perf_counter), Clock(time.process_time)
    watch.console.begin_link(member.name, progress.total_steps, engine.global_step)
    batches: Iterator[AnyBatch] = iter(loader)
    saved_at = engine.global_step if engine.global_step else -1
    while engine.global_step < progress.total_steps:
        batch = _next_batch(batches, watch.stop, runtime)
        if batch is None:
            if saved_at != engine.global_step:
                save(engine, folder, progress, lineage, watch.checkpoint.keep, runtime)
            where = f"step {engine.global_step} of {progress.total_steps}"
            raise StopRequested(f"{member.name}: stopped at {where}; give the same command again to go on")
        if engine.global_step == 0:
            progress.align_at_step0 = _check_alignment(engine, member, batch)
            if progress.align_at_step0:
                watch.console.align_at_start(member.name, sum(progress.align_at_step0.values()))
        result = engine.step(batch)
        step = engine.global_step
        progress.samples += result.samples
        progress.aligned_samples += result.samples if result.aligned else 0
        progress.skipped += result.skipped
        progress.loss = result.loss
        progress.wall_s += clock.lap()
        progress.cpu_s += cpu_clock.lap()
        throughput.add(result.samples)
        last = step == progress.total_steps
        if step % watch.report.every_steps == 0 or last or step == 1:
            rates = throughput.read((progress.total_steps - step) * result.samples)
            scalars = {"loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm, **rates.scalars()}
            scalars |= {"samples": progress.samples, "macs": entry.chain_macs_before + progress.macs["total"]}
            watch.log.log(member.name, step, parts=result.parts, skipped=progress.skipped, **scalars)
            watch.console.line(step, scalars, result.parts)
        else:
            watch.console.advance(step)
        throughput.pause()
        tasks = not last and watch.tasks.due(step)
        if step % save_every == 0 or last or tasks:
            save(engine, folder, progress, lineage, watch.checkpoint.keep, runtime)
            saved_at = step
        if evaluate_steps and step % evaluate_steps == 0 and not last:
            watch.evaluate(engine, progress.position(step, entry))
        if tasks:
            watch.tasks.run(progress.position(step, entry), checkpoint=read_pointer(folder))
        throughput.resume()
        clock.lap()
        cpu_clock.lap()
    if progress.total_steps and saved_at != progress.total_steps:
        save(engine, folder, progress, lineage, watch.checkpoint.keep, runtime)
    if member.settings.evaluate.at_end and progress.total_steps:
        watch.evaluate(engine, progress.position(engine.global_step, entry))


def _next_batch(batches: Iterator[AnyBatch], stop: StopFlag, runtime: Runtime) -> AnyBatch | None:
    """This rank's next batch; None on every rank if any was asked to stop. Collective.

    Data that one rank cannot read (over the skip budget) is an error on every rank, so that none waits for it.
    """
    batch, error = None, None
    try:
        batch = next(batches)
    except UserError as raised:
        error = raised
    worst = runtime.max(2 if error is not None else 1 if stop.requested else 0)
    if worst == 2:
        raise next(found for found in runtime.exchange(error) if found is not None)
    return None if worst == 1 else batch


def _layout_line(member: Member, topology: Topology) -> str:
    """How a link is spread, in a few words."""
    parallel = member.settings.parallel
    sizes = {
        "tensor": topology.tensor,
        "pipeline": topology.pipeline,
        "virtual": topology.virtual,
        "data": topology.data,
    }
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    run = parallel.as_run(topology.data, member.settings.precision).zero
    alone = f" (run as {run}: one data-parallel rank)" if run != parallel.zero else ""
    return f"engine {parallel.engine}, {split}, ZeRO {parallel.zero}{alone}"


def _peak(runtime: Runtime, member: Member) -> float | None:
    """FLOP/s of all devices of the job together, None where the device's peak is not known."""
    if runtime.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(runtime.device), member.settings.precision)
    return None if peak is None else peak * runtime.world


def _check_alignment(engine: TrainingEngine, member: Member, batch: AnyBatch) -> dict[str, float]:
    """The alignment loss before the first step; an exactly grown model must start at zero, to rounding. Which layers
    are alike, the recipe does not say."""
    losses = engine.alignment_at_start(batch)
    exact = member.grow is not None and member.grow.operator == "exact" and not member.grow.allow_approximate
    limit = _ALIGN_NOISE[member.settings.precision]
    if exact and any(not value <= limit for tower, value in losses.items() if not tower.startswith("layer_")):
        raise UserError(
            f"{member.name}: grown by 'exact', but its features differ from the predecessor's at step 0 "
            f"({losses}, rounding stays below {limit:g}); check the grown checkpoint with: compt verify"
        )
    return losses


def _teaching(
    member: Member, parent_checkpoint: Path | None, steps: int, runtime: Runtime, topology: Topology
) -> tuple[Teacher | None, Alignment | None, Distillation | None, Projections | None]:
    """What a link learns from its predecessor by, none of it where it does not. Collective."""
    if not member.taught or not member.train:
        return None, None, None, None
    assert parent_checkpoint is not None
    align, distill = member.align, member.distill
    entries = None
    if distill is not None and topology.has_outputs:
        entries = ModelPart.current(member.spec).box(head_key(member.spec))[0]
    teacher = Teacher.load(
        parent_checkpoint,
        torch.bfloat16 if member.settings.precision == "bf16" else torch.float32,
        runtime.device,
        group=topology.model_group,
        tensor_group=topology.neighbours(member.teacher_tensor),
        entries=entries,
    )
    alignment = distillation = projections = None
    if align is not None:
        alignment = Alignment(
            weight=align.weight,
            schedule=align.schedule,
            end_step=_end_step(align.end, steps),
            clamp=align.clamp,
            distance=align.distance,
            towers=(("hidden",) if align.hidden else ()) if member.spec.is_language_model else tuple(align.towers),
            layers=align.layers,
        )
        exact = member.grow is not None and member.grow.operator == "exact"
        projections = Projections.between(
            member.spec, teacher.spec, member.settings.seed, leading=exact, states=alignment.towers or ()
        )
    if distill is not None:
        distillation = Distillation(
            weight=distill.weight,
            temperature=distill.temperature,
            top_k=distill.top_k,
            schedule=distill.schedule,
            end_step=_end_step(distill.end, steps),
            chunk=member.settings.objective.chunk,
        )
    return teacher, alignment, distillation, projections


def _end_step(end: float | None, steps: int) -> int | None:
    return None if end is None else max(1, round(end * steps))
