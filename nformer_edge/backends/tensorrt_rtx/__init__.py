"""TensorRT-RTX: plans for GeForce GPUs, built without a GPU."""
