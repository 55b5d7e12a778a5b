"""The ledger as a table for people."""

from __future__ import annotations

from amct_pytorch.report.ledger import LayerEntry, Ledger


def ledger_table(ledger: Ledger) -> str:
    """One line a layer and a summary, as plain text.

    Args:
        ledger: what to show.

    Returns:
        Text without a final newline.
    """
    header = ("layer", "type", "weights", "input scale", "offset", "SQNR dB", "cosine", "")
    rows = [header, *(_row(entry) for entry in ledger.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(_aligned(cell, widths[i], i) for i, cell in enumerate(row)) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([line.rstrip() for line in lines] + ["", *_summary(ledger)])


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in (0, 1, 2, 7) else cell.rjust(width)


def _row(entry: LayerEntry) -> tuple[str, ...]:
    if entry.status != "quantized":
        return (entry.name, entry.type, "float", "", "", "", "", entry.reason or "")
    per = "channel" if (entry.weight_scales or 1) > 1 else "tensor"
    weights = f"int{entry.weight_bits}/{per}" if entry.weight_scales else "none"
    notes = list(entry.notes)
    if entry.fused:
        notes.insert(0, f"+{entry.fused}")
    return (
        entry.name,
        entry.type,
        weights,
        _number(entry.input_scale, ".4g"),
        _number(entry.input_offset, "d"),
        "exact"
        if entry.sqnr_db is None and entry.cosine is not None
        else _number(entry.sqnr_db, ".1f"),
        _number(entry.cosine, ".5f"),
        "; ".join(notes),
    )


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _summary(ledger: Ledger) -> list[str]:
    quantized = [entry for entry in ledger.layers if entry.status == "quantized"]
    lines = [f"{len(quantized)} of {len(ledger.layers)} layers quantized"]
    corrected = sum(bool(entry.bias_corrected) for entry in quantized)
    if corrected:
        lines[0] += f", {corrected} biases corrected"
    if ledger.output is not None:
        shown = "no error" if ledger.output.sqnr_db is None else f"{ledger.output.sqnr_db:.1f} dB"
        text = f"model output on calibration data: SQNR {shown}, cosine {ledger.output.cosine:.5f}"
        if ledger.output.top1_agreement is not None:
            text += f", top-1 agreement {ledger.output.top1_agreement:.1%}"
        lines.append(text)
    if ledger.bytes:
        sizes = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in ledger.bytes.items())
        lines.append(f"files: {sizes}")
    if ledger.seconds:
        steps = ", ".join(f"{name} {value:.1f}" for name, value in ledger.seconds.items())
        lines.append(f"seconds: {steps}")
    return lines + [f"note: {note}" for note in ledger.notes]
