"""The group of all subcommands, which are loaded when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

import click

from amct_pytorch import __version__

# Subcommand -> (module under amct_pytorch.cli, one line of help); the function is `command`.
COMMANDS = {
    "compare": ("compare", "Compare a quantized model with its float model, output by output."),
    "completion": ("completion", "Print the script that completes words in a shell."),
    "doctor": ("doctor", "Say what is installed, and what runs fast or clips on this machine."),
    "inspect": ("inspect", "Show what is in a file: config, record, ledger, ONNX, safetensors."),
    "qdq": ("qdq", "Turn a deploy model into portable QuantizeLinear/DequantizeLinear ONNX."),
    "quantize": ("quantize", "Quantize a float model to int8 by calibration on your data."),
    "report": ("report", "Write a ledger as one HTML page."),
    "run": ("run", "Run a model on your data and keep its outputs."),
}

EPILOG = """\b
Exit status:
  0    done
  1    something that was given is wrong: file, data, model; one line says what
  2    wrong usage of the command line
  3    done, but an accuracy goal (--min-...) is missed
  4    a defect of amct itself; run again with --traceback
  130  interrupted (Ctrl-C); 143: terminated; nothing is left half-written
"""


class LazyGroup(click.Group):
    """Loads a subcommand when it is asked for, not for a list of their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand, or None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"amct_pytorch.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Click's, with the nearest name where one is wrong."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from amct_pytorch.errors import did_you_mean

            hint = did_you_mean(args[0], COMMANDS)
            ctx.fail(f"No such command {args[0]!r}{hint}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of subcommands, from `COMMANDS`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="amct")
def amct() -> None:
    """Compress neural networks: quantize, compare, look into files, write reports."""
