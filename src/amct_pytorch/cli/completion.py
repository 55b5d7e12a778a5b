"""`amct completion`: the script that completes words in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from amct_pytorch.cli.command import Output, subcommand

HOW = {
    "bash": 'eval "$(amct completion bash)"     # in ~/.bashrc',
    "zsh": 'eval "$(amct completion zsh)"      # in ~/.zshrc',
    "fish": "amct completion fish | source     # in ~/.config/fish/config.fish",
}


@subcommand("completion", short_help="Print the script that completes words in a shell.")
@click.argument("shell", type=click.Choice(list(HOW)))
def command(output: Output, shell: str) -> None:
    """Print the script with which SHELL completes commands, options and files of amct.

    \b
    eval "$(amct completion bash)"     # in ~/.bashrc
    eval "$(amct completion zsh)"      # in ~/.zshrc
    amct completion fish | source      # in ~/.config/fish/config.fish
    """
    from amct_pytorch.cli.root import amct

    kind = get_completion_class(shell)
    assert kind is not None
    source = kind(amct, {}, "amct", "_AMCT_COMPLETE").source()
    output.document = {"shell": shell, "script": source}
    output.say(source)
