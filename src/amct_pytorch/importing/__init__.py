"""ONNX files as torch modules, for models whose Python code is not at hand."""
