"""TensorRT plans, of TensorRT and TensorRT-RTX: graphs prepared, built in a process of their own, and audited."""
