"""Facts about this machine, as `amct doctor` tells them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = (
    "amct-pytorch", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "protobuf", "pydantic",
    "safetensors", "click", "jinja2", "pillow", "transformers",
)  # fmt: skip
# Those that a feature needs and an installation may do without.
EXTRAS = {
    "jinja2": "amct report (pip install 'amct-pytorch[report]')",
    "pillow": "images as data (pip install 'amct-pytorch[images]')",
}
_INT8_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


def versions() -> dict[str, str | None]:
    """Versions of Python and of packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if found["amct-pytorch"] is None:
        from amct_pytorch import __version__

        found["amct-pytorch"] = __version__
    return found


def processor() -> dict[str, Any]:
    """Model, int8 instructions, cores and threads."""
    import torch

    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key in ("flags", "Features"):
                flags = value
                break
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    present = [flag for flag in _INT8_FLAGS if flag in flags.split()]
    return {
        "model": model,
        "machine": platform.machine(),
        "int8 instructions": present,
        "VNNI": any("vnni" in flag for flag in present),
        "cores": os.cpu_count(),
        "cores allowed": allowed,
        "torch threads": torch.get_num_threads(),
        **{name: os.environ.get(name, "not set") for name in THREADS},
    }


def devices() -> dict[str, Any]:
    """Devices of torch and providers of ONNX Runtime."""
    import onnxruntime
    import torch

    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {"CUDA": gpus}
    for name in ("xpu", "npu", "mps"):
        module = getattr(torch, name, None)
        available = getattr(module, "is_available", None)
        if available is not None and available():
            found[name] = "available"
    found["ONNX Runtime providers"] = onnxruntime.get_available_providers()
    return found


def kernels() -> dict[str, str]:
    """Which of ONNX Runtime's int8 kernels give exact sums here."""
    from amct_pytorch.export.integer_kernels import exact_kernels
    from amct_pytorch.export.runtime import fast_kernels_clip

    clip = "clip: wrong results without a word" if fast_kernels_clip() else "exact"
    return {
        "u8 x s8 in fused QDQ layers, default session": clip,
        "ConvInteger, exact kinds, fastest first": ", ".join(exact_kernels("Conv")),
        "MatMulInteger, exact kinds, fastest first": ", ".join(exact_kernels("MatMul")),
    }


def speeds() -> dict[str, float | None]:
    """How many times as fast as float one quantized convolution is, one thread."""
    model, feeds = _convolution()
    quantized = _quantized_convolution()
    base = _session(model, exact=False)
    found: dict[str, float | None] = {}
    for name, exact in (("int8, kernels that do not clip", True), ("int8, default kernels", False)):
        try:
            sessions = {"float": base, "int8": _session(quantized, exact)}
            found[name] = _ratio(sessions, feeds)
        except Exception:  # the runtime lacks what this needs, in whatever way
            found[name] = None
    return found


def _session(model: Any, exact: bool) -> Any:
    import onnxruntime

    from amct_pytorch.export.runtime import cpu_options

    return onnxruntime.InferenceSession(
        model.SerializeToString(),
        cpu_options(1, exact_int8=exact),
        providers=["CPUExecutionProvider"],
    )


def _ratio(sessions: dict[str, Any], feeds: dict[str, np.ndarray]) -> float:
    from amct_pytorch.export.runtime import interleaved_latency

    times = interleaved_latency(sessions, dict.fromkeys(sessions, feeds), rounds=20, warm_up=3)
    # The fastest of each: on a busy machine the others tell of its neighbours.
    return round(min(times["float"]) / min(times["int8"]), 3)


_SHAPE = (1, 64, 56, 56)
_WEIGHT = (64, 64, 3, 3)


def _graph(nodes: list[Any], constants: dict[str, np.ndarray]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    from amct_pytorch.export.opset import IR_VERSION, OPSET

    graph = helper.make_graph(
        nodes,
        "one_convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )


def _convolution() -> tuple[Any, dict[str, np.ndarray]]:
    from onnx import helper

    rng = np.random.default_rng(0)
    weight = rng.standard_normal(_WEIGHT).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    x = rng.standard_normal(_SHAPE).astype(np.float32)
    return _graph([node], {"w": weight}), {"x": x}


def _quantized_convolution() -> Any:
    from onnx import helper

    rng = np.random.default_rng(0)
    constants = {
        "scale": np.float32(0.03),
        "zero": np.uint8(128),
        "w": rng.integers(-127, 128, _WEIGHT).astype(np.int8),
        "w_scale": np.full(_WEIGHT[0], 0.01, np.float32),
        "w_zero": np.zeros(_WEIGHT[0], np.int8),
        "y_scale": np.float32(0.5),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=0),
        helper.make_node("Conv", ["xf", "wf"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "y_scale", "zero"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "y_scale", "zero"], ["y"]),
    ]
    return _graph(nodes, {name: np.asarray(value) for name, value in constants.items()})


def advice(
    versions: dict[str, str | None],
    processor: dict[str, Any],
    devices: dict[str, Any],
    kernels: dict[str, str],
    speeds: dict[str, float | None],
) -> list[str]:
    """What follows from the facts, in sentences."""
    found = []
    if any(text.startswith("clip") for text in kernels.values()):
        found.append(
            'QDQ files in ONNX Runtime: set the session entry session.x64quantprecision to "1"; '
            "without it results are wrong here (amct run and compare set it)"
        )
    else:
        found.append("QDQ files in ONNX Runtime: default sessions are right here")
    exact = speeds.get("int8, kernels that do not clip")
    if exact is not None:
        if exact < 1.1:
            found.append(
                f"int8 is {exact:.2f} times as fast as float in ONNX Runtime on this processor: it "
                "saves memory and file size, hardly time"
            )
        else:
            found.append(f"int8 is {exact:.2f} times as fast as float in ONNX Runtime here")
    found.append(
        "deploy models run here with exact integers (amct run, amct.DeploySession), to check them; "
        "for speed use Ascend, or the QDQ file"
    )
    if not devices["CUDA"] and not {"xpu", "npu", "mps"} & set(devices):
        found.append("no GPU: calibration and training run on the processor")
    allowed, threads = processor["cores allowed"], processor["torch threads"]
    if threads > 1 and processor["OMP_WAIT_POLICY"] != "PASSIVE":
        found.append(
            f"torch uses {threads} threads; on a busy machine OMP_WAIT_POLICY=PASSIVE keeps them "
            "from waiting for each other"
        )
    if allowed is not None and threads > allowed:
        found.append(f"torch uses {threads} threads on {allowed} cores: set OMP_NUM_THREADS")
    for package, what in EXTRAS.items():
        if versions.get(package) is None:
            found.append(f"{package} is missing, which is needed for {what}")
    return found
