"""Our two operators in TensorRT: a library that is built once, or kernels compiled ahead of time into the plan."""
