"""The two operators: their contract, the plain torch reference, native kernels and ONNX bodies."""
