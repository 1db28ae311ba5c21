"""One command, one table: every operation against its bare products, eager PyTorch, torch.compile and Liger-Kernel.

python kernels/bench/bench.py                 on a GPU: measures all, writes benchmarks/results/kernels.json
python kernels/bench/bench.py                 without one: the model of bytes and operations, marked as model
python kernels/bench/bench.py --dry-run       every code path at tiny sizes on the CPU, kernels emulated
python kernels/bench/bench.py --sanitize      runs every operation once under compute-sanitizer's four tools
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from kernels.bench.cases import Bar, Case, Impl, Tensors, all_cases, backward  # noqa: E402
from kernels.bench.measure import Effort, Floors, extra_bytes, floors, launches, median_seconds  # noqa: E402

RESULTS = HERE.parents[1] / "benchmarks" / "results" / "kernels.json"
CACHE_BYTES = 256 << 20  # buffers rotate until they are more than any GPU's cache
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Row:
    """What was found about one case: seconds by implementation, ratios by bar."""

    case: str
    source: str  # measured, dry-run or model
    seconds: dict[str, float] = field(default_factory=dict)
    extra_bytes: int | None = None
    launches: int | None = None
    bars: list[dict[str, object]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def measured(case: Case, device: torch.device, impl: Impl, floor: Floors, effort: Effort) -> Row:
    row = Row(case.name, "measured" if device.type == "cuda" else "dry-run")
    sets = [case.make(device)]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    if device.type == "cuda":
        sets += [case.make(device) for _ in range(min(16, CACHE_BYTES // size))]
    implementations = {"kernels": lambda x: case.ours(x, impl), **case.rivals}
    for name, function in implementations.items():

        def step(tensors: Tensors, function=function) -> None:
            backward(function(tensors), tensors)

        steps = [lambda x=x, step=step: step(x) for x in sets]
        try:
            row.seconds[name] = median_seconds(steps, effort)
            if name == "kernels" and device.type == "cuda":
                row.extra_bytes, row.launches = extra_bytes(steps[0]) - case.results, launches(steps[0])
        except (torch.OutOfMemoryError, ImportError, TypeError, RuntimeError) as error:
            if name == "kernels":
                raise
            row.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            torch.cuda.empty_cache()
    if case.products is not None:
        products = case.products
        row.seconds["products"] = median_seconds([lambda x=x: products(x) for x in sets], effort)
    row.bars = [bar_of(row, case, bar, floor) for bar in case.bars]
    if case.launch_bar is not None and row.launches is not None:
        row.bars.append(as_dict(Bar("launches", case.launch_bar, True), row.launches))
    return row


def bar_of(row: Row, case: Case, bar: Bar, floor: Floors) -> dict[str, object]:
    """The ratio that a bar is about: times of others over ours, ours over the products, or bytes."""
    ours, ratio = row.seconds.get("kernels"), None
    if bar.of == "extra memory":
        ratio = row.extra_bytes
    elif ours is None:
        pass
    elif bar.of == "copy":
        ratio = case.bytes / ours / floor.bandwidth
    elif bar.of == "products":
        ratio = ours / row.seconds["products"]
    elif bar.of in row.seconds:
        ratio = row.seconds[bar.of] / ours
    return as_dict(bar, ratio)


def as_dict(bar: Bar, ratio: float | None) -> dict[str, object]:
    met = None if ratio is None else bar.met(ratio)
    return {"of": bar.of, "bound": bar.bound, "sign": "<=" if bar.at_most else ">=", "ratio": ratio, "met": met}


def modelled(case: Case, floor: Floors) -> Row:
    """The time of our bytes and of our operations at given rates, one after the other; nothing is run."""
    row = Row(case.name, "model", extra_bytes=None if case.extra is None else int(case.extra))
    row.seconds["kernels"] = case.bytes / floor.bandwidth + case.operations / floor.rate
    if case.bare_operations:
        row.seconds["products"] = case.bare_operations / floor.rate
    row.seconds |= {name: size / floor.bandwidth for name, size in case.rival_bytes.items()}
    bars = [bar for bar in case.bars if bar.of != "copy"]  # in the model that is 1
    row.bars = [bar_of(row, case, bar, floor) for bar in bars]
    return row


def table(rows: list[Row], floor: Floors, title: str) -> str:
    lines = [title, f"copy {floor.bandwidth / 1e12:.2f} TB/s, products {floor.rate / 1e12:.0f} TFLOP/s", ""]
    lines.append(f"{'operation':<42}{'ms':>10}{'GB extra':>10}  {'bar':<30}{'found':>12}  met")
    for row in rows:
        extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 1e9:.3f}"
        head = f"{row.case:<42}{row.seconds['kernels'] * 1e3:>10.3f}{extra:>10}"
        for bar in row.bars or [as_dict(Bar("", 0, True), None)]:
            ratio, met = bar["ratio"], {True: "yes", False: "NO", None: "-"}[bar["met"]]  # type: ignore[index]
            met = "-" if row.source == "dry-run" else met
            bytes_of = bar["of"] == "extra memory"
            found = "-" if ratio is None else f"{ratio / 1e9:.3f} GB" if bytes_of else f"{ratio:.2f}"  # type: ignore[operator]
            bound = f"{bar['bound'] / 1e9:.3g} GB" if bytes_of else f"{bar['bound']:g}"  # type: ignore[operator]
            name = f"{bar['of']} {bar['sign']} {bound}" if bar["of"] else ""
            lines.append(f"{head}  {name:<30}{found:>12}  {met if name else ''}")
            head = " " * len(head)
        lines += [f"    {name} did not run: {why}" for name, why in row.missing.items()]
    return "\n".join(lines)


def sanitize() -> int:
    """Every operation once, at small sizes, under each tool of compute-sanitizer; the number of tools that complain."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    bad = 0
    for name in SANITIZERS:
        command = [tool, f"--tool={name}", "--error-exitcode=1", sys.executable, __file__, "--once"]
        print(" ".join(command), flush=True)
        bad += subprocess.run(command).returncode != 0
    print("compute-sanitizer: " + ("clean" if not bad else f"{bad} of {len(SANITIZERS)} tools complain"))
    return bad


def once(device: torch.device, impl: Impl) -> None:
    """Every operation, forward and backward, in every dtype, with what it has by way of masks and labels."""
    from compt_kernels import contrastive_loss, distill_kl, siglip_loss

    for case in all_cases(small=True):
        tensors = case.make(device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            cast = [x.detach().to(dtype if x.ndim else x.dtype).requires_grad_(x.requires_grad) for x in tensors]
            backward(case.ours(cast, impl), cast)
    image, text = (torch.randn(70, 17, device=device, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (5.0, -5.0))
    labels = torch.arange(70, device=device) % 9
    backward(contrastive_loss(image, text, scale, labels, impl=impl), [image, text, scale])
    backward(siglip_loss(image, text, scale, bias, labels, impl=impl), [image, text, scale, bias])
    head = torch.randn(333, 17, device=device, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = distill_kl(image, head, text, head.detach(), 2.0, labels > 2, 40, reduction, impl=impl)
        backward(loss.sum(), [image, head])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: shows that every path runs")
    parser.add_argument("--sanitize", action="store_true", help="every operation once under compute-sanitizer")
    parser.add_argument("--once", action="store_true", help="every operation once, without measuring")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument(
        "--json", type=Path, help="where to write; measured results go to benchmarks/results by default"
    )
    parser.add_argument("--bandwidth", type=float, default=3.0, help="of the model, TB/s")
    parser.add_argument("--rate", type=float, default=700.0, help="of the model, TFLOP/s in bf16")
    options = parser.parse_args(arguments)
    if options.sanitize:
        return sanitize()
    gpu = torch.cuda.is_available() and not options.dry_run
    device, impl = (torch.device("cuda"), "cuda") if gpu else (torch.device("cpu"), "emulated")
    if options.once:
        once(device, impl)
        return 0
    cases = [case for case in all_cases(small=options.dry_run) if options.only in case.name]
    if not gpu and not options.dry_run:
        floor = Floors(options.bandwidth * 1e12, options.rate * 1e12)
        rows = [modelled(case, floor) for case in cases]
        title = "MODEL, nothing measured (no GPU here): bytes and operations at assumed rates"
    else:
        effort = Effort() if gpu else Effort(1, 0)
        floor = floors(device, options.dry_run, effort)
        rows = [measured(case, device, impl, floor, effort) for case in cases]
        title = torch.cuda.get_device_name() if gpu else "DRY RUN: tiny sizes on the CPU, times mean nothing"
    print(table(rows, floor, title))
    path = options.json or (RESULTS if gpu and not options.only else None)
    if path is not None:
        kept = json.loads(path.read_text()) if path.exists() else {}
        name = torch.cuda.get_device_name() if gpu else rows[0].source if rows else "none"
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
        kept[name] = {**versions, "floors": asdict(floor), "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    if options.dry_run:
        once(device, impl)
        print("every operation ran in every dtype")
    return 0


if __name__ == "__main__":
    sys.exit(main())
