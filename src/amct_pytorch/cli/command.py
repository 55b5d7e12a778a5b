"""What all subcommands share: --json, --traceback, errors in one line, exit statuses."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from amct_pytorch.errors import AmctError

OK, USER_ERROR, USAGE, GOAL_MISSED, DEFECT = 0, 1, 2, 3, 4
INTERRUPTED, TERMINATED = 130, 143

# Of the JSON documents; keys may be added without a new number.
JSON_VERSION = 1


class GoalMissed(Exception):
    """The work is done and its result falls short of a goal that was given."""


class Terminated(BaseException):
    """The process was asked to end (SIGTERM): leave as on Ctrl-C, with everything cleared away."""


class Output:
    """Where a subcommand says what it found: text for people, or one JSON document.

    Args:
        as_json: whether a program reads it.

    Attributes:
        document: what the JSON document will hold beside its head.
    """

    def __init__(self, command: str, as_json: bool) -> None:
        self.as_json = as_json
        self.document: dict[str, Any] = {}
        self._command = command

    def say(self, text: str = "") -> None:
        """A line for people; nothing where a program reads."""
        if not self.as_json:
            click.echo(text)

    def note(self, text: str) -> None:
        """A line on the progress of work, to standard error."""
        if not self.as_json:
            click.echo(text, err=True)

    def finish(self, status: int, error: BaseException | None = None) -> None:
        """Prints the JSON document, where one is wanted."""
        if not self.as_json:
            return
        head: dict[str, Any] = {
            "amct": JSON_VERSION,
            "command": self._command,
            "status": status,
        }
        if error is not None:
            head["error"] = {"type": type(error).__name__, "message": str(error)}
        click.echo(json.dumps({**head, **self.document}, indent=2, allow_nan=False))


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def subcommand(name: str, **settings: Any) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a function a subcommand that is given its `Output` first.

    Adds ``--json`` and ``--traceback``; turns errors into one line and an exit status.
    """

    def make(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def call(json_output: bool, show_traceback: bool, **given: Any) -> None:
            output = Output(name, json_output)
            status, error = _status_of(lambda: function(output, **given))
            if error is not None and not isinstance(error, GoalMissed) and show_traceback:
                traceback.print_exception(error)
            output.finish(status, error)
            if error is not None and not json_output:
                click.echo(_line(error), err=True)
            sys.exit(status)

        call = click.option(
            "--traceback", "show_traceback", is_flag=True, help="Show where an error came from."
        )(call)
        call = click.option(
            "--json", "json_output", is_flag=True, help="Print one JSON document, for programs."
        )(call)
        made: click.Command = click.command(name, **settings)(call)
        return made

    return make


def _status_of(work: Callable[[], None]) -> tuple[int, BaseException | None]:
    try:
        with _terminating():
            work()
    except GoalMissed as error:
        return GOAL_MISSED, error
    except AmctError as error:
        return USER_ERROR, error
    except (click.ClickException, click.exceptions.Exit):
        raise
    except (KeyboardInterrupt, click.Abort) as error:
        return INTERRUPTED, error
    except Terminated as error:
        return TERMINATED, error
    except BrokenPipeError:
        raise
    except Exception as error:
        return DEFECT, error
    return OK, None


def _line(error: BaseException) -> str:
    if isinstance(error, GoalMissed):
        return f"amct: goal missed: {error}"
    if isinstance(error, AmctError):
        return f"amct: error: {error}"
    if isinstance(error, (KeyboardInterrupt, click.Abort, Terminated)):
        return "amct: interrupted; nothing was left half-written"
    return (
        f"amct: internal error: {type(error).__name__}: {error} (a defect of amct; run again with "
        "--traceback and report it)"
    )


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: str = "") -> str:
    """Rows in columns.

    Args:
        header: of the columns.
        rows: their cells.
        right: numbers of the columns that are aligned to the right, as in ``"123"``.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(widths[i]) if str(i) in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "-" * len(line(header)), *map(line, rows)])


def bytes_text(size: int) -> str:
    """A size for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def number_text(value: float | None, spec: str, none: str = "") -> str:
    """A number for people; `none` where there is none."""
    return none if value is None else format(value, spec)
