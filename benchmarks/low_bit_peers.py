"""SmolLM2-135M in int4 groups of 64, side by side with other open tools.

All get the same float weights and the same tokens to calibrate on, and are judged by one function
on the same tokens of another article. Each is a fresh process on one thread, in its own
environment (`peers.py install llmcompressor gptqmodel modelopt`); one that is missing or fails is
a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
from language_tokens import calibration_and_evaluation, load
from peers import ENVIRONMENTS_FOLDER

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "outputs" / "bench" / "low_bit"
RESULTS = HERE / "results" / "low_bit_peers.json"
README = HERE / "README.md"
BEGIN, END = "<!-- low-bit peers: begin -->", "<!-- low-bit peers: end -->"
BLOCKS = 30


@dataclass(frozen=True)
class Contender:
    """One row: a script of `contenders`, its arguments, and the environment it runs in."""

    label: str
    script: str
    arguments: list[str] = field(default_factory=list)
    environment: str | None = None

    def python(self) -> Path:
        """The interpreter; None as environment stands for the project's."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS_FOLDER / self.environment / "bin" / "python"


CONTENDERS = {
    "float": Contender("float, one pass over the calibration tokens", "low_bit_float.py"),
    "nearest": Contender("nearest, asymmetric", "low_bit_amct.py", ["minmax"]),
    "gptq": Contender("**amct_pytorch**, gptq, asymmetric", "low_bit_amct.py", ["gptq"]),
    "awq": Contender("**amct_pytorch**, awq, asymmetric", "low_bit_amct.py", ["awq"]),
    "awq-symmetric": Contender(
        "**amct_pytorch**, awq, symmetric", "low_bit_amct.py", ["awq", "symmetric"]
    ),
    "gptqmodel": Contender(
        "GPTQModel, GPTQ, asymmetric", "low_bit_gptqmodel.py", environment="gptqmodel"
    ),
    "llmcompressor": Contender(
        "llm-compressor, GPTQ, asymmetric", "low_bit_llmcompressor.py", environment="llmcompressor"
    ),
    "modelopt": Contender(
        "ModelOpt, AWQ, symmetric", "low_bit_modelopt.py", environment="modelopt"
    ),
}


def prepare() -> None:
    """Writes the float model and the tokens that all contenders read."""
    model, tokenizer = load()
    calibration, evaluation = calibration_and_evaluation(tokenizer)
    WORK.mkdir(parents=True, exist_ok=True)
    np.save(WORK / "calibration.npy", calibration.numpy())
    np.save(WORK / "evaluation.npy", evaluation.numpy())
    # transformers saves no model that it read from a GGUF file: the same weights in a plain one.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(WORK / "float")
    tokenizer.save_pretrained(WORK / "float")


def run(name: str, limit: float) -> dict[str, Any]:
    """The report of one contender, or the reason why there is none."""
    contender = CONTENDERS[name]
    if not contender.python().exists():
        return {"skipped": f"not installed: peers.py install {contender.environment}"}
    out = WORK / f"{name}.json"
    out.unlink(missing_ok=True)
    script = HERE / "contenders" / contender.script
    command = [str(contender.python()), str(script), *contender.arguments]
    environment = {**os.environ, **machine.SETTINGS, "HF_HUB_OFFLINE": "1"}
    with (WORK / f"{name}.log").open("wb") as log:
        try:
            done = subprocess.run(
                [*command, "--work", str(WORK), "--out", str(out)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"not done after {limit:.0f} s"}
    if done.returncode or not out.exists():
        last = (WORK / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
        return {"skipped": f"failed: {' '.join(last)[:160]}"}
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def table(results: dict[str, Any]) -> str:
    lines = [
        f"CPU: {results['machine']['cpu']}; one thread. int4 weights in groups of 64, calibrated "
        "on 32 × 256 tokens, perplexity on 16 × 256.",
        "",
        "| contender | perplexity | CPU s | CPU s a block | × float pass | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    floor = results["contenders"].get("float", {}).get("cpu_s")
    for name, report in results["contenders"].items():
        label = CONTENDERS[name].label
        if "skipped" in report:
            lines.append(f"| {label} | {report['skipped']} | – | – | – | – |")
            continue
        times = f"{report['cpu_s'] / floor:.1f}" if floor else "–"
        version = f" {report['version']}" if CONTENDERS[name].environment else ""
        lines.append(
            f"| {label}{version} | {report['perplexity']:.2f} | {report['cpu_s']:.0f} "
            f"| {report['cpu_s'] / BLOCKS:.1f} | {times} | {report['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="default: all; saves nothing")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each contender")
    options = parser.parse_args()
    prepare()
    rows = {}
    for name in options.only or CONTENDERS:
        rows[name] = run(name, options.limit)
        print(name, rows[name], flush=True)
    results = {"machine": machine.describe(), "contenders": rows}
    print(table(results))
    if options.only:
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = README.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(f"{text[:start]}\n{table(results)}\n{text[end:]}")


if __name__ == "__main__":
    main()
