"""Is it as good as we say: protocols, yardsticks and results. `python -m benchmarks --help`."""
