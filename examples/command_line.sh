#!/bin/sh
# EfficientNet-Lite0 to int8 by the amct command alone: from an ONNX file and photos to a deploy
# model, its comparison with float on photos that calibration never saw, and an HTML report.
# Run it with `make command-line`, or with amct and the packages of examples/requirements.txt
# installed: sh examples/command_line.sh
set -eu
out=outputs/command_line
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

amct doctor
python examples/export_cnn.py "$out"
amct quantize "$out/lite0.onnx" --data "$out/calibration" --mean 127 --std 128 \
  --batch-size 4 --out "$out/int8/lite0" --qdq --report --min-sqnr 15
amct compare "$out/lite0.onnx" "$out/int8/lite0_qdq_model.onnx" --data "$out/heldout" \
  --preprocessing "$out/int8/lite0_preprocessing.json" --min-sqnr 15 --min-top1 0.9
amct run "$out/int8/lite0_deploy_model.onnx" --data "$out/heldout" \
  --preprocessing "$out/int8/lite0_preprocessing.json" --out "$out/answers"
amct inspect "$out/int8/lite0_deploy_model.onnx"
echo "open $out/int8/lite0_report.html in a browser"
