"""onnxruntime on the CPU."""
