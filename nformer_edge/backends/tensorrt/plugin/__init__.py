"""The two operators in TensorRT: a plugin library, or kernels compiled ahead of time into the plan."""
