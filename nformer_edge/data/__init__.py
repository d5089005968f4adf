"""Readers of the re-identification datasets, a generated dataset, the identity sampler and the loaders."""
