"""How others lay out their weights: one module a project, each from a state dictionary to a `Plan`."""
