"""torchao's PT2E flow with its x86 quantizer, then the ONNX exporter on the reference model."""

import logits
import torch
from contract import Job
from ort_sessions import cpu_session
from plain_network import plain
from real_models import efficientnet_lite0
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    model = plain(efficientnet_lite0())
    batches = [torch.from_numpy(batch) for batch in job.calibration_batches()]
    batch_axis = ({0: torch.export.Dim("batch")},)
    with job.call():
        with torch.no_grad():
            exported = torch.export.export(model, (batches[0],), dynamic_shapes=batch_axis).module()
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
            prepared = prepare_pt2e(exported, quantizer)
            for batch in batches:
                prepared(batch)
            converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
    ways, files = {"simulated": logits.of_module(converted)}, {}
    note = "given the plain network"
    files["qdq"] = export(converted, batches[0], batch_axis, job)
    try:
        cpu_session(files["qdq"])
        ways["qdq"] = logits.of_onnx(files["qdq"])
    except Exception as failure:  # ONNX Runtime has no public class for it
        reason = str(failure).strip()[-100:]
        note += f"; ONNX Runtime refuses its ONNX file when exact kernels are asked for: …{reason}"
    job.finish(["torchao", "torch"], ways, files, note)


def export(converted, batch, batch_axis, job):
    """Write the quantized graph as ONNX; its time is measured apart from the call."""
    file = job.folder / "int8.onnx"
    with job.phase("export"):
        program = torch.export.export(converted, (batch,), dynamic_shapes=batch_axis)
        torch.onnx.export(
            program,
            (batch,),
            file,
            dynamo=True,
            input_names=["input"],
            verbose=False,
            external_data=False,
        )
    return file


if __name__ == "__main__":
    main()
