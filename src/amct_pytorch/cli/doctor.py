"""`amct doctor`: what is installed, and what runs fast or clips here."""

from __future__ import annotations

from typing import Any

import click

from amct_pytorch.cli.command import Output, subcommand, table


@subcommand("doctor")
@click.option("--quick", is_flag=True, help="Measure no speeds.")
def command(output: Output, quick: bool) -> None:
    """Say which versions, processors and runtimes there are, and what is fast or wrong here.

    Tries ONNX Runtime's int8 kernels on the worst inputs: on x86 processors without VNNI the fast
    ones clip sums in silence. Measures int8 against float on one convolution, one thread.
    """
    from amct_pytorch.cli import machine

    output.note("trying kernels" if quick else "trying and timing kernels: a few seconds")
    versions = machine.versions()
    processor = machine.processor()
    devices = machine.devices()
    kernels = machine.kernels()
    speeds = {} if quick else machine.speeds()
    advice = machine.advice(versions, processor, devices, kernels, speeds)
    output.document = {
        "versions": versions,
        "processor": processor,
        "devices": devices,
        "kernels": kernels,
        "speed_over_float": speeds,
        "advice": advice,
    }
    if output.as_json:
        return
    rows = [(name, version or "not installed") for name, version in versions.items()]
    output.say(table(("package", "version"), rows))
    output.say()
    _tell(output, "processor", processor)
    _tell(output, "devices", devices)
    _tell(output, "int8 kernels of ONNX Runtime", kernels)
    if speeds:
        shown = {
            name: "cannot be measured" if ratio is None else f"{ratio:.2f} times float"
            for name, ratio in speeds.items()
        }
        _tell(output, "speed of one convolution, 64 channels, 3x3, one thread", shown)
    output.say("what this means")
    for text in advice:
        output.say(f"  - {text}")


def _tell(output: Output, title: str, facts: dict[str, Any]) -> None:
    output.say(title)
    for name, value in facts.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value)) or "none"
        output.say(f"  {name}: {value}")
    output.say()
