"""Measurements of the package: protocols, yardsticks and results. `python -m benchmarks --help`."""
