"""Devices: recipes, the comparison of a machine with a recipe, and what this machine lacks."""
