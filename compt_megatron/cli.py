"""The `compt` command: one function per subcommand, which calls the Python function that does the work.

Everything heavy is imported where it is used: `compt --help`, `plan`, `grow` and `inspect` need neither megatron-core
nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compt_megatron import __version__
from compt_megatron import cli_values as values
from compt_megatron.cli_exit import guarded
from compt_megatron.cli_parser import Commands, Parser, count, parse
from compt_megatron.errors import Terminated, UserError
from compt_megatron.spec.table import ModelSpec

if TYPE_CHECKING:
    from compt_megatron.observe.transfer import Transfer

Arguments = argparse.Namespace

_SHORT = ("grow", "convert", "inspect", "verify")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status (see `errors`)."""
    return guarded(lambda: parse(build_parser(), argv))


def entry() -> NoReturn:
    """`compt` as a shell calls it. A command on checkpoints ends at once, without half a second of torch's clearing up:
    what counts is on the disk, and it leaves nobody behind."""
    status = main()
    if sys.argv[1:2] and sys.argv[1] in _SHORT:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def train(args: Arguments) -> None:
    from compt_megatron.recipe.load import load_recipe, resolved

    recipe = load_recipe(args.recipe, args.overrides)
    if args.print_recipe:
        print(resolved(recipe), end="")
        return
    args.run_dir = args.run_dir or Path("runs") / recipe.name
    from compt_megatron.chain.runner import run

    run(recipe, args.run_dir, link=args.link, resume=args.resume)


def plan(args: Arguments) -> None:
    from compt_megatron.chain.hardware import Hardware
    from compt_megatron.chain.plan_view import print_plan
    from compt_megatron.chain.planner import make_plan
    from compt_megatron.recipe.load import load_recipe

    hardware = Hardware(memory=args.memory * 1e9)
    made = make_plan(load_recipe(args.recipe, args.overrides), args.ranks, hardware, scaling=args.scaling)
    _show(args, made.to_dict(), lambda _: print_plan(made))


def grow(args: Arguments) -> None:
    from compt_megatron.checkpoint.contract import Layout
    from compt_megatron.checkpoint.manifest import read_manifest
    from compt_megatron.growth.api import Certificate, GrowthPlan
    from compt_megatron.growth.api import grow as grow_checkpoint

    sharing = _sharing(args)
    with _terminable(), _transfer(args) as transfer:
        made = grow_checkpoint(
            args.src,
            args.dst,
            args.to,
            source_spec=args.source_config,
            operator=args.operator,
            depth=args.depth,
            axes=dict(args.axes) or None,
            format=args.format,
            dtype=args.dtype,
            seed=args.seed,
            allow_approximate=args.allow_approximate,
            noise=args.noise,
            moments=args.moments,
            layout=Layout(args.tensor, args.pipeline),
            overwrite=args.overwrite,
            dry_run=args.dry_run,
            trust_pickle=args.trust_pickle,
            progress=transfer,
            **sharing,
        )
    if "exchange" in sharing and not args.dry_run:
        transfer.add_up(sharing["exchange"])
    if not transfer.leads:
        return
    if isinstance(made, GrowthPlan):
        _show(args, made.to_dict(), lambda _: print(made.describe()))
        return
    assert isinstance(made, Certificate)
    counts = {kind: list(made.tensors.values()).count(kind) for kind in dict.fromkeys(made.tensors.values())}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    exact = "the same function" if made.exact else "not the same function"
    grown = f"{made.target['name']} grown from {made.source['name']} by {made.operator!r}"
    line = f"{args.dst}: {grown}, {exact} (tensors: {said})"
    notes = (read_manifest(Path(args.dst)) or {}).get("notes", [])
    _show(args, made.to_dict(), lambda _: print("\n".join([line, *notes, transfer.summary()])))


def convert(args: Arguments) -> None:
    from compt_megatron.checkpoint.api import convert as convert_checkpoint
    from compt_megatron.checkpoint.contract import Layout, dtype_of

    sharing = _sharing(args)
    with _terminable(), _transfer(args) as transfer:
        left_out = convert_checkpoint(
            args.src,
            args.dst,
            args.format,
            spec=_spec(args),
            dtype=dtype_of(args.dtype) if args.dtype else None,
            layout=Layout(args.tensor, args.pipeline),
            overwrite=args.overwrite,
            trust_pickle=args.trust_pickle,
            progress=transfer,
            **sharing,
        )
    if "exchange" in sharing:
        transfer.add_up(sharing["exchange"])
    if transfer.leads:
        print("\n".join([f"{args.dst}: written as {args.format}", *left_out, transfer.summary()]))


def inspect(args: Arguments) -> None:
    from compt_megatron.chain.views import print_inspection
    from compt_megatron.checkpoint.api import inspect as inspect_checkpoint

    _show(args, inspect_checkpoint(args.checkpoint, _spec(args), args.trust_pickle), print_inspection)


def verify(args: Arguments) -> None:
    from compt_megatron.chain.verify import examine, require_sound
    from compt_megatron.chain.views import print_verification

    records = examine(args.checkpoint, args.against, _spec(args), trust_pickle=args.trust_pickle)
    _show(args, records, print_verification)
    require_sound(records)


def evaluate(args: Arguments) -> None:
    from compt_megatron.chain.evaluation import evaluate_checkpoint
    from compt_megatron.chain.views import print_evaluation
    from compt_megatron.recipe.sections import EvaluateSettings

    _require_something_to_evaluate(args)
    spec = _spec(args)
    sets: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, float]] = {}
    if args.tasks:
        from compt_megatron.chain.task_evaluation import evaluate_tasks

        with _terminable():
            tasks = evaluate_tasks(
                args.checkpoint,
                args.tasks,
                include=args.include_path,
                limit=args.limit,
                shots=args.shots,
                batch_size=args.batch_size,
                tokenizer=args.tokenizer,
                spec=spec,
            )
    if args.data:
        given = {"batch_size": args.batch_size} if args.batch_size else {}
        settings = EvaluateSettings(templates=args.template or ["{}"], **given)
        sets = evaluate_checkpoint(args.checkpoint, args.data, spec=spec, settings=settings, length=args.length)
    _show(args, sets | tasks, lambda _: print_evaluation(sets, tasks))


def _require_something_to_evaluate(args: Arguments) -> None:
    if not args.data and not args.tasks:
        raise UserError("compt eval: give --data, or --tasks for a language model; see `compt eval --help`")
    for needed, names in (("data", ("template", "length")), ("tasks", ("include_path", "limit", "shots", "tokenizer"))):
        for name in names:
            if not getattr(args, needed) and getattr(args, name) is not None:
                option = name.replace("_", "-")
                raise UserError(f"compt eval: --{option} is for --{needed}, which is not given; leave it out")


def export(args: Arguments) -> None:
    from compt_megatron.chain.export import export as export_checkpoint

    left_out = export_checkpoint(
        args.checkpoint,
        args.dst,
        args.format,
        spec=_spec(args),
        overwrite=args.overwrite,
        trust_pickle=args.trust_pickle,
    )
    print("\n".join([f"{args.dst}: exported", *left_out]))


def report(args: Arguments) -> None:
    from compt_megatron.observe.report import write_report

    print(write_report(args.run_dir, args.out))


def emoji(args: Arguments) -> None:
    from compt_megatron.data.emoji import build_emoji

    built = build_emoji(args.dst, args.size, work_dir=args.work_dir)
    print(f"{built.path}: " + ", ".join(f"{count} {split}" for split, count in built.samples.items()))


def text(args: Arguments) -> None:
    from compt_megatron.data.text.build import Request, build_text

    *sources, args.dst = args.paths
    if not sources:
        raise UserError("compt data text: give the corpus and DST, the new folder; see `compt data text --help`")
    request = Request(
        tokenizer=args.tokenizer,
        train_bpe=args.train_bpe,
        append_eod=args.append_eod,
        eod_token=args.eod,
        field=args.field,
        lines=args.lines,
        held_out=args.held_out,
        by_file=args.split_by == "file",
    )
    with _terminable(), _transfer(args) as transfer:
        record = build_text(sources, args.dst, request, workers=args.workers, progress=transfer)
    splits = [f"{name}: {size.documents} documents, {size.tokens} tokens" for name, size in record.splits.items()]
    line = f"{args.dst}: " + "; ".join([*splits, f"vocabulary {record.vocab_size}"])
    _show(args, asdict(record), lambda _: print("\n".join([line, transfer.summary()])))


def doctor(args: Arguments) -> None:
    from compt_megatron.chain.doctor import advice, examine
    from compt_megatron.chain.views import print_health

    found = examine()
    _show(args, found, lambda found: print_health(found, advice(found)))


def _show(args: Arguments, value: Any, for_people: Any) -> None:
    """One JSON document on stdout under --json, else what `for_people` prints."""
    if args.json:
        print(json.dumps(value, indent=1, default=str))
    else:
        for_people(value)


def _transfer(args: Arguments) -> Transfer:
    """Shows how the writing of args.dst goes on; under a launcher the first worker alone does."""
    from compt_megatron.observe.transfer import Transfer

    return Transfer(str(args.dst), quiet=getattr(args, "json", False) or getattr(args, "dry_run", False))


def _sharing(args: Arguments) -> dict[str, Any]:
    """How the work is shared: --workers, or the processes of torchrun. This process is for nothing else."""
    from compt_megatron.checkpoint.workers import launched
    from compt_megatron.heap import one_heap

    one_heap()
    place = launched()
    if place is None:
        return {"workers": args.workers}
    if args.workers > 1:
        raise UserError(f"--workers {args.workers}: a launcher started {place.world} processes; leave it out")
    return {"shard": place.shard, "exchange": place.exchange}


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM leaves what is written, as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _spec(args: Arguments) -> ModelSpec | None:
    """The parameter table of --from, None where it is not given."""
    from compt_megatron.spec.families import load_spec

    return load_spec(args.source_config) if args.source_config else None


def build_parser() -> Parser:
    """The whole command line. Option names avoid every prefix of torchrun's and deepspeed's own, which swallow them."""
    parser = Parser(prog="compt", description="Train a family of models as a chain, each grown from the one before.")
    parser.add_argument("--version", action="version", version=f"compt {__version__}")
    commands = parser.add_commands()

    command = commands.add("train", train, "train a chain, or go on with it", "compt train emoji links.0.epochs=4")
    command.recipe()
    command.add_argument("--link", metavar="NAME", help="train this link (or control) only")
    command.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH", help="go on (default), start anew, or from a checkpoint"
    )
    command.add_argument("--run-dir", type=Path, metavar="DIR", help="the run folder (default: runs/<recipe name>)")
    command.add_argument("--print-recipe", action="store_true", help="print the recipe with every default, and stop")

    command = commands.add("plan", plan, "cost, memory and layout of every link", "compt plan cc3m --ranks 8")
    command.recipe()
    help_text = "processes to plan for (default: the fewest that the recipe's layouts allow)"
    command.add_argument("--ranks", type=count, metavar="N", help=help_text)
    help_text = "memory of a device, for the layouts that are proposed (default: 80)"
    command.add_argument("--memory", type=count, default=80, metavar="GB", help=help_text)
    command.add_argument("--scaling", action="store_true", help="propose layouts for 8 to 512 devices too")
    command.json()

    command = commands.add(
        "grow", grow, "grow a checkpoint into a larger model", "compt grow small.pt large.pt --to ViT-B-16"
    )
    command.add_argument("src", metavar="SRC", help="the checkpoint to grow")
    command.add_argument("dst", metavar="DST", help="where the result goes: a folder, or one .pt or .safetensors file")
    command.add_argument("--to", required=True, metavar="MODEL_CONFIG", help="the larger model")
    command.add_argument(
        "--operator", choices=("exact", "corner", "reference"), default="exact", help="how (default: exact)"
    )
    command.add_argument(
        "--depth", metavar="MODE", help="where new layers come from: identity, interleave, stack, middle"
    )
    command.add_argument(
        "--set",
        dest="axes",
        action="append",
        default=[],
        type=values.axis,
        metavar="AXIS=MODE",
        help="the mode of one axis",
    )
    command.source_config()
    command.trust_pickle()
    command.add_argument(
        "--format",
        metavar="F",
        help="of the result: hf, open_clip, megatron, megatron-lm, deepspeed (default: the source's)",
    )
    command.dtype()
    command.sharing()
    command.add_argument(
        "--moments", choices=("fresh", "grow"), default="fresh", help="of the optimizer: left out (default), or grown"
    )
    command.add_argument(
        "--noise",
        type=values.noise,
        default=0.0,
        metavar="X",
        help="parts the copies of `tile`, such as 0.01 (default: 0)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of everything new (default: 0)")
    command.add_argument(
        "--allow-approximate", action="store_true", help="record what cannot be exact, do not refuse it"
    )
    command.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    command.overwrite()
    command.json()

    command = commands.add(
        "convert", convert, "write a checkpoint in another format", "compt convert in out --format open_clip"
    )
    command.add_argument("src", metavar="SRC", help="the checkpoint")
    command.add_argument("dst", metavar="DST", help="where the result goes")
    command.add_argument(
        "--format", required=True, metavar="F", help="megatron, megatron-lm, deepspeed, open_clip or hf"
    )
    command.source_config()
    command.trust_pickle()
    command.dtype()
    command.sharing()
    command.overwrite()

    command = commands.add("inspect", inspect, "what a checkpoint holds", "compt inspect runs/demo/s/export")
    command.checkpoint()
    command.trust_pickle()
    command.json()

    command = commands.add("verify", verify, "check a checkpoint, or all of a run", "compt verify runs/demo")
    command.checkpoint("a checkpoint, or a run folder")
    command.trust_pickle()
    command.add_argument("--against", metavar="SRC", help="the checkpoint that it was grown from")
    command.json()

    command = commands.add(
        "eval",
        evaluate,
        "zero-shot accuracy and retrieval, perplexity, or lm-eval's tasks",
        "compt eval runs/demo/s/export --data emoji/held_out_artist",
    )
    command.checkpoint()
    command.add_argument("--data", action="append", metavar="DATA", help="a data set; may be repeated")
    command.add_argument(
        "--template",
        action="append",
        type=values.template,
        metavar="TEXT",
        help="a prompt with {} for the class; may be repeated",
    )
    help_text = "images or sequences at a time (default: 256, with tasks 16)"
    command.add_argument("--batch-size", type=count, metavar="N", help=help_text)
    help_text = "tokens of a window that perplexity is measured on (default: as many as the model has positions)"
    command.add_argument("--length", type=count, metavar="N", help=help_text)
    help_text = "tasks, groups or tags of lm-eval, with commas between them"
    command.add_argument("--tasks", type=values.names, metavar="NAMES", help=help_text)
    command.add_argument("--include-path", metavar="DIR", help="a folder with tasks of one's own, as lm-eval's YAML")
    command.add_argument("--limit", type=count, metavar="N", help="documents of each task (default: all)")
    help_text = "examples in a prompt (default: as each task says)"
    command.add_argument("--shots", type=values.whole, metavar="N", help=help_text)
    help_text = "a tokenizer.json, or its folder (default: beside CKPT, or as its run records)"
    command.add_argument("--tokenizer", metavar="PATH", help=help_text)
    command.json()

    command = commands.add(
        "export",
        export,
        "write a model for other people's tools",
        "compt export runs/demo/s/export clip.pt --format open_clip",
    )
    command.checkpoint()
    command.trust_pickle()
    command.add_argument("dst", metavar="DST", help="where the result goes")
    command.add_argument("--format", metavar="F", help="open_clip or hf (default: the one that has the model)")
    command.overwrite()

    command = commands.add("report", report, "pictures and tables of a run", "compt report runs/demo")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run folder")
    command.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: RUN_DIR/report)")

    sets = commands.add("data", emoji, "build a data set", "compt data emoji my-emoji --size 64")
    _add_data_sets(sets.add_commands("SET", required=True))

    command = commands.add("doctor", doctor, "what this machine has, what is missing for what", "compt doctor")
    command.json()
    return parser


def _add_data_sets(sets: Commands) -> None:
    summary = "build the built-in pictures and captions"
    command = sets.add("emoji", emoji, summary, "compt data emoji my-emoji --size 64")
    command.add_argument("dst", type=Path, metavar="DST", help="a new folder")
    command.add_argument("--size", type=int, default=32, metavar="N", help="pixels of a side (default: 32)")
    command.add_argument("--work-dir", type=Path, metavar="DIR", help="keeps the downloaded packages")

    example = "compt data text corpus/ my-text --tokenizer llama/ --append-eod --workers 8"
    command = sets.add("text", text, "turn text into token ids, as Megatron's indexed datasets", example)
    help_text = "files or folders of .txt and .jsonl (.gz, .zst), then DST, a new folder"
    command.usage = "compt data text SRC [SRC ...] DST (--tokenizer PATH | --train-bpe VOCAB) [options]"
    command.add_argument("paths", nargs="+", metavar="SRC ... DST", help=help_text)
    help_text = "a Hugging Face tokenizer.json, or a folder that holds one"
    command.add_argument("--tokenizer", metavar="PATH", help=help_text)
    command.add_argument("--train-bpe", type=count, metavar="VOCAB", help="train a BPE of so many tokens first")
    command.add_argument("--append-eod", action="store_true", help="end each document with the token for that")
    command.add_argument("--eod", metavar="TOKEN", help="that token, where the tokenizer does not say which")
    help_text = "where the text is in a line of a .jsonl file (default: text)"
    command.add_argument("--field", default="text", metavar="NAME", help=help_text)
    command.add_argument("--lines", action="store_true", help="each line of a .txt file is a document, not the file")
    help_text = "the share of documents, such as 0.05, that become the split held_out (default: 0)"
    command.add_argument("--held-out", type=values.share, default=0.0, metavar="X", help=help_text)
    help_text = "hold out documents (default) or whole files"
    command.add_argument("--split-by", choices=("document", "file"), default="document", help=help_text)
    help_text = "processes that share the work (default: 1)"
    command.add_argument("--workers", type=count, default=1, metavar="N", help=help_text)
    command.json()
