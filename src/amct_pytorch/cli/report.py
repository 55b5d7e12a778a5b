"""`amct report`: a ledger as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from amct_pytorch.cli.command import Output, bytes_text, subcommand


@subcommand("report")
@click.argument("ledger", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="File to write [default: beside the ledger]."
)
@click.option(
    "--ranking",
    type=click.Path(path_type=Path),
    help="Ranking that accuracy_based_auto_calibration wrote [default: found beside the ledger].",
)
@click.option(
    "--comparison",
    type=click.Path(path_type=Path),
    help="What `amct compare --json` printed: accuracy and latency on data of your own [default: "
    "found beside the ledger].",
)
def command(
    output: Output, ledger: Path, out: Path | None, ranking: Path | None, comparison: Path | None
) -> None:
    """Write the ledger file LEDGER as one HTML page that needs nothing else, not even a network.

    Any ledger will do: of calibration, of decomposition, of low-bit layers, …
    """
    from amct_pytorch.cli.wrong_kind import kind_told
    from amct_pytorch.logs import start_logging
    from amct_pytorch.report.html import report_path, write_report

    start_logging(to_file=False)
    target = out or report_path(ledger)
    with kind_told(ledger, "LEDGER", "a ledger", ("ledger",)):
        write_report(ledger, target, ranking=ranking, comparison=comparison)
    size = target.stat().st_size
    output.document = {"file": str(target), "bytes": size}
    output.say(f"{target} ({bytes_text(size)})")
