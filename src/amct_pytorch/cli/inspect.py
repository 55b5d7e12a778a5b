"""`amct inspect`: what is in a file, as a table."""

from __future__ import annotations

from pathlib import Path

import click

from amct_pytorch.cli.command import Output, subcommand, table


@subcommand("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--all", "all_rows", is_flag=True, help="Show every row, not only the first 60.")
def command(output: Output, file: Path, all_rows: bool) -> None:
    """Say what FILE is and show what is in it.

    Known are configs (JSON and .cfg), records, ledgers, preprocessing files, ONNX models (float,
    modified, deploy, fake-quant, QDQ) and safetensors of quantized layers.
    """
    from amct_pytorch.cli.contents import contents_of

    found = contents_of(file)
    output.document = {
        "file": str(file),
        "kind": found.kind,
        "facts": found.facts,
        "columns": list(found.columns),
        "rows": [dict(zip(found.columns, row, strict=True)) for row in found.rows],
    }
    if output.as_json:
        return
    output.say(f"{file}: {found.kind}")
    for name, value in found.facts.items():
        output.say(f"  {name}: {value}")
    if not found.rows:
        return
    most = len(found.rows) if all_rows else 60
    rows = [tuple(_text(cell) for cell in row) for row in found.rows[:most]]
    right = "".join(
        str(i) for i in range(1, min(len(found.columns), 10)) if _numeric(found.rows, i)
    )
    output.say()
    output.say(table(found.columns, rows, right=right))
    if len(found.rows) > most:
        output.say(f"and {len(found.rows) - most} more (--all shows them)")


def _numeric(rows: list[tuple[object, ...]], column: int) -> bool:
    return all(isinstance(row[column], (int, float, type(None))) for row in rows)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
