"""TensorRT 8.5 to 11: graphs prepared, plans built in a process of their own, audited, and run on a GPU."""
