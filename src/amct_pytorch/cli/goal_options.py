"""The options with which subcommands take goals for accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def goal_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--min-sqnr``, ``--min-cosine`` and ``--min-top1``."""
    options = (
        click.option("--min-sqnr", type=float, help="Goal: SQNR of every output, dB."),
        click.option("--min-cosine", type=float, help="Goal: cosine of every output."),
        click.option(
            "--min-top1",
            type=click.FloatRange(0, 1),
            help="Goal: share of samples with the same best class.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function
