"""ONNX to engine. One file a backend here; what these stand on lies in the corners beside them."""
