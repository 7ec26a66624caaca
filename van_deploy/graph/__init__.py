"""From a network to a checked ONNX graph: exact rewrites, export, simplification."""
