"""What `compt plan` prints for people: costs, layouts, and with --scaling the efficiency on more ranks."""

from __future__ import annotations

from compt_megatron.chain.hardware import Hardware
from compt_megatron.chain.layouts import Proposal
from compt_megatron.chain.planner import MemberPlan, Plan
from compt_megatron.chain.views import print_fields, print_table
from compt_megatron.observe.numbers import human, percent


def print_plan(plan: Plan) -> None:
    """The costs of a plan, its sums against training each member alone, the layouts, and its notes."""
    unit = "MACs per sample" if plan.relative else "MACs"
    length = "Epochs" if plan.links[0].tokens is None else "Tokens"
    headings = ("Link", "Model", "Parameters", length, "Steps", f"{unit}, train", "teacher", "total", "of alone")
    members = (*plan.links, *plan.controls)
    ranks = f"{plan.world} rank{'s' if plan.world > 1 else ''}"
    print_table(f"{plan.name} on {ranks}", headings, [_cost_row(member) for member in members], text=(0, 1))
    print()
    print_fields(_sums(plan, unit))
    print()
    columns = ("Link", "Batch", "Layout", "Memory a rank*", "Step", "MFU", "GPU-hours*")
    rows = [row for member in members for row in _layout_rows(member)]
    print_table(f"Layouts on {ranks}, and the cheapest that fits", columns, rows, text=(0, 2))
    if plan.links[0].scaling:
        print()
        _print_scaling(plan)
    print()
    print(f"* predicted for {_assumptions(plan.hardware)}")
    for note in plan.notes:
        print(f"note: {note}")


def _name(member: MemberPlan) -> str:
    return f"{member.name} (control)" if member.kind == "control" else member.name


def _cost_row(member: MemberPlan) -> tuple[str, ...]:
    return (
        _name(member),
        member.model,
        human(member.parameters),
        _length(member),
        human(member.steps),
        human(member.macs["train"]),
        human(member.macs["teacher"]),
        human(member.macs["total"]),
        percent(member.share),
    )


def _length(member: MemberPlan) -> str:
    if member.tokens is not None:
        return human(member.tokens)
    return "-" if member.epochs is None else f"{member.epochs:g}"


def _sums(plan: Plan, unit: str) -> list[tuple[str, str]]:
    extra = sum(link.macs["extra"] for link in plan.links)
    fields = [("chain", f"{human(plan.total_macs)} {unit}")]
    if plan.alone_macs is not None and plan.speed_up is not None:
        fields.append(("each alone", f"{human(plan.alone_macs)} {unit}, all for the samples of the base"))
        fields.append(("family", f"{plan.speed_up:.2f} times cheaper as a chain"))
        last = f"{percent(plan.last_share)} of training {plan.links[-1].name} alone"
        fields.append(("whole chain", last))
    if plan.hours is not None:
        alone = "" if plan.alone_hours is None else f"; each alone {human(plan.alone_hours)}"
        fields.append(("GPU-hours*", f"{human(plan.hours)} in the layouts of the recipe{alone}"))
    if extra:
        fields.append(("done again", f"{human(extra)} {unit}, forwards that save memory, not counted above"))
    return fields


def _layout_rows(member: MemberPlan) -> list[tuple[str, ...]]:
    """The recipe's layout of a member, and the cheapest where that is another one."""
    hours = "-" if member.hours is None else human(member.hours)
    rows = [(_name(member), f"{member.precision} {member.own.batch}", *_layout_cells(member.own), hours)]
    best = member.cheapest
    if best is None:
        rows.append(("", "", "nothing fits", "-", "-", "-", "-"))
    elif best.layout != member.own.layout:
        ratio = best.time.total / member.own.time.total
        rows.append(("", "", *_layout_cells(best), "-" if member.hours is None else human(member.hours * ratio)))
    return rows


def _layout_cells(one: Proposal) -> tuple[str, ...]:
    time = one.time
    return one.describe(), f"{human(one.memory.total)}B", f"{human(time.total)} s", percent(time.mfu)


def _print_scaling(plan: Plan) -> None:
    """Every link's cheapest layout on more and more ranks; efficiency is speed a rank against the fewest that fit."""
    headings = ("Link", "Ranks", "Layout", "Memory a rank*", "Step", "MFU", "Samples/s", "Efficiency")
    rows: list[tuple[str, ...]] = []
    for link in plan.links:
        fits = {ranks: one for ranks, one in link.scaling.items() if one is not None}
        first = next(iter(fits.values()), None)
        for ranks, one in link.scaling.items():
            if one is None or first is None:
                rows.append((link.name, str(ranks), "nothing fits", "-", "-", "-", "-", "-"))
                continue
            share = (one.samples_per_second / ranks) / (first.samples_per_second / first.ranks)
            rows.append((link.name, str(ranks), *_layout_cells(one), human(one.samples_per_second), percent(share)))
    print_table("The cheapest layouts that fit, the recipe's batch", headings, rows, text=(0, 2))


def _assumptions(hardware: Hardware) -> str:
    peaks = f"{human(hardware.peak_bf16)}FLOP/s bf16 ({human(hardware.peak_fp32)}FLOP/s fp32)"
    return (
        f"{human(hardware.memory)}B a GPU, filled to {percent(hardware.usable, 0)}, {hardware.per_node} GPUs a node, "
        f"{peaks} of which large products reach {percent(hardware.sustained, 0)} (half of that at "
        f"{hardware.half_tokens} tokens), {human(hardware.nvlink)}B/s within a node, {human(hardware.network)}B/s a "
        f"GPU between nodes, {hardware.latency * 1e6:.0f} us a transfer, {hardware.launch * 1e6:.0f} us to launch "
        "a block; not measured"
    )
