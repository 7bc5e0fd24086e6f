"""The command line: parse, call, print. torch is imported inside the commands, so `--help` and mistakes answer at once.

Exit codes: 0 done; 1 failed, and what was done is kept; 2 the request itself is wrong. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from errata.cli.app import app
from errata.edits.errors import LedgerBusy, LedgerDamaged, LedgerUnopened

STOPPED = 130  # as a shell reports Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit. With ERRATA_DEBUG=1 an error keeps its traceback."""
    raise SystemExit(call(list(sys.argv[1:] if argv is None else argv)))


def call(argv: Sequence[str]) -> int:
    """Run the command line; the exit code."""
    try:
        code = int(app(args=list(argv), prog_name="errata", standalone_mode=False) or 0)
    except typer.Abort:
        code = STOPPED
    except (typer.TyperException, ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("ERRATA_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {_line(error)}", file=sys.stderr)
        return _code(error)
    if code == STOPPED:
        print("error: stopped; what was done is kept", file=sys.stderr)
    return code


def _line(error: Exception) -> str:
    """One line that says what is wrong; where errata did not foresee it, how to see more."""
    if isinstance(error, typer.TyperException):
        return " ".join(error.format_message().split())
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text if _ours(error) or isinstance(error, OSError) else f"{text} ({type(error).__name__}; ERRATA_DEBUG=1 shows where)"


def _code(error: Exception) -> int:
    """2 where another request is the way out: misused options, what errata refuses, files that are not there."""
    if isinstance(error, typer.TyperException):
        return error.exit_code
    if isinstance(error, LedgerBusy | LedgerDamaged | LedgerUnopened):
        return 1
    refused = isinstance(error, ValueError) and _ours(error)
    return 2 if refused or isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) else 1


def _ours(error: Exception) -> bool:
    """Whether errata itself raised it (its own types, and plain ones with a message of ours), not a library below."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals["__name__"] if frame else ""
    return any(name.split(".")[0] == "errata" for name in (type(error).__module__, module))
