"""argparse as `compt` needs it: mistakes are UserErrors of one line, options are never abbreviated."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from compt_megatron.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """One command, or (with `add_commands`) all of them. The methods add what several commands share."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.commands: Commands | None = None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")

    def add_commands(self, metavar: str = "COMMAND", required: bool = False) -> Commands:
        self.commands = Commands(self.add_subparsers(metavar=metavar, required=required, parser_class=Parser))
        return self.commands

    def recipe(self) -> None:
        self.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a packaged one")
        self.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="recipe fields, such as links.2.epochs=4"
        )

    def checkpoint(self, what: str = "a checkpoint in any format") -> None:
        self.add_argument("checkpoint", metavar="CKPT", help=what)
        self.source_config()

    def source_config(self) -> None:
        self.add_argument(
            "--from", dest="source_config", metavar="MODEL_CONFIG", help="the model, where the file does not say"
        )

    def trust_pickle(self) -> None:
        self.add_argument("--trust-pickle", action="store_true", help="read a foreign file that holds Python objects")

    def dtype(self) -> None:
        self.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")

    def sharing(self) -> None:
        help_text = "processes that share the work (default: 1)"
        self.add_argument("--workers", type=count, default=1, metavar="N", help=help_text)
        for side in ("tensor", "pipeline"):
            help_text = f"{side}-parallel ranks that the result's files are cut for (default: 1)"
            self.add_argument(f"--{side}", type=count, default=1, metavar="N", help=help_text)

    def overwrite(self) -> None:
        self.add_argument("--overwrite", action="store_true", help="replace DST if it exists")

    def json(self) -> None:
        self.add_argument("--json", action="store_true", help="print one JSON document")


def count(text: str) -> int:
    """A whole number above 0, as an option's value."""
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


class Commands:
    """The subcommands, in the order in which they were added."""

    def __init__(self, subparsers: Any) -> None:
        self._subparsers = subparsers
        self.parsers: dict[str, Parser] = {}

    def add(self, name: str, function: Callable[..., None], summary: str, example: str) -> Parser:
        parser: Parser = self._subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"example: {example}"
        )
        parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake, too")
        parser.set_defaults(command=function, name=name)
        self.parsers[name] = parser
        return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command. Overrides may stand anywhere after the recipe, paths anywhere among the options.
    Raises UserError for a mistake."""
    given = _without_local_rank(sys.argv[1:] if argv is None else argv)
    assert parser.commands is not None
    names = list(parser.commands.parsers)
    if not given:
        raise UserError(f"compt: give a command: {', '.join(names)}; see `compt --help`")
    if not given[0].startswith("-") and given[0] not in names:
        near = difflib.get_close_matches(given[0], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"compt: no command {given[0]!r}; {hint}")
    args, left = parser.parse_known_args(given)
    if hasattr(args, "overrides"):
        # argparse gives a starred positional only the arguments that directly follow the one before it
        args.overrides = [*args.overrides, *(text for text in left if "=" in text and not text.startswith("-"))]
        left = [text for text in left if "=" not in text or text.startswith("-")]
    if hasattr(args, "paths"):
        args.paths = [*args.paths, *(text for text in left if not text.startswith("-"))]
        left = [text for text in left if text.startswith("-")]
    if left:
        raise UserError(_unknown(left[0], _innermost(parser, given)))
    return args


def _innermost(parser: Parser, given: Sequence[str]) -> Parser:
    """The parser of the command that the arguments begin with."""
    for text in given:
        if parser.commands is None or text not in parser.commands.parsers:
            break
        parser = parser.commands.parsers[text]
    return parser


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """The arguments without `--local_rank N`: deepspeed puts it first, older launchers last, and LOCAL_RANK says it."""
    kept: list[str] = []
    skip = False
    for text in argv:
        name, equals, _ = text.partition("=")
        if skip:
            skip = False
        elif name in ("--local_rank", "--local-rank"):
            skip = not equals
        else:
            kept.append(text)
    return kept


def _unknown(text: str, parser: Parser) -> str:
    if not text.startswith("-"):
        return f"{parser.prog}: unexpected {text!r}; see `{parser.prog} --help`"
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(text.partition("=")[0], options, n=1)
    return f"{parser.prog}: unknown option {text!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"see `{parser.prog} --help`"
    )
