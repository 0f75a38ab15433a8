"""The `hires` command line. One module per subcommand, imported only when its command is called.

A subcommand module has `add_arguments(parser)` and `run(args) -> int | None`.
"""

import argparse
import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from hires import __version__
from hires.errors import HiresError, redacted, unknown

# name -> one line of help; the module is hires.cli.<name with "-" as "_">
COMMANDS = {
    "generate": "make images from a prompt, or from your own image",
    "show": "how an image came to be, or make it once more",
    "doctor": "what this machine offers, and what to mend",
    "plan": "what a configuration will make, and about how long it takes",
    "run": "make everything of a configuration in this process, without Snakemake",
    "verify": "whether results are as they were made",
    "collect": "bring together scores that several machines made",
    "prompts": "stage: draw the prompts of a configuration",
    "references": "stage: the reference images of a configuration",
    "base": "stage: one shard of base latents",
    "images": "stage: one shard of images",
    "features": "stage: features of image sets, or of references",
    "scores": "stage: scores of image sets",
    "metrics": "stage: collect scores, intervals and paired tests into one tidy table",
    "notebook": "stage: run one notebook on the results of a configuration",
    "report": "stage: the HTML report of a configuration",
    "provenance": "stage: what made the results of a configuration",
    "checksums": "stage: SHA-256 of everything that a configuration made",
    "costs": "measure seconds and memory of a configuration's image sets, one at a time",
    "speed": "measure steps, images and attention kernels on this machine's GPU",
    "memory": "measure seconds and memory of whole images on this machine's GPU",
    "train": "train the embedded models, or an adapter for Scale-DiT",
    "promote": "copy finished models, scores and measurements into the tracked tree",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit code 0, or 2 with one line on stderr for bad input (1: a fault of ours)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="hires",
        description="4K and 8K images from the diffusion models you already have, and the reproduction of two papers.",
        epilog="`hires COMMAND --help` says what a command takes. `hires run` runs every stage in its order.",
    )
    parser.add_argument("--version", action="version", version=f"hires {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    if argv[0].startswith("-"):
        parser.parse_args(argv)
    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        module = importlib.import_module(f"hires.cli.{argv[0].replace('-', '_')}")
        sub = _Parser(
            prog=f"hires {argv[0]}",
            description=(module.__doc__ or COMMANDS[argv[0]]).strip(),
            formatter_class=_HelpFormatter,
        )
        module.add_arguments(sub)
        code = module.run(sub.parse_args(argv[1:], argparse.Namespace(argv=argv))) or 0
        sys.stdout.flush()
        return code
    except HiresError as error:
        print(f"hires {argv[0]}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a name that the file system refuses, a file that can't be read
        if isinstance(error, BrokenPipeError) and _unread():
            return 141  # what a shell tells of SIGPIPE
        print(f"hires {argv[0]}: {HiresError(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hires {argv[0]}: interrupted; finished work is kept", file=sys.stderr)
        return 130
    except Exception as error:
        from hires.execution.oom import ADVICE, described, exhausted

        if exhausted(error):
            print(f"hires {argv[0]}: {described(error)}; {ADVICE}", file=sys.stderr)
            return 2
        print(redacted(traceback.format_exc()), file=sys.stderr, end="")
        return 1


def _unread() -> bool:
    """Whether nobody reads stdout any more, as after `| head`; what is left for it is dropped."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    gone = any(events & select.POLLERR for _, events in stdout.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(str(HiresError(message)))


class _HelpFormatter(argparse.HelpFormatter):
    """Paragraphs of a description stay apart, indented ones as they are; a default is told where there is one."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if part[0] == " " else fill(part, width, indent) for part in text.split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        given = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        unstated = action.nargs == 0 or action.required or given in ("None", "", "inf")
        return text if unstated or "default" in text else f"{text} (default: {given})"
