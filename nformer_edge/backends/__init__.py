"""Everything that runs a model: one folder or file a backend, each with the two words `build` and `run`."""
