"""Evaluation, parity and benchmarks, and the HTML page that shows them."""
