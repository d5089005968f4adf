"""PyTorch to ONNX: the bundle, its graphs, and how a graph is opened. `nformer_edge.export` is a function."""
