"""What is to be shown of the captured loop, as checks: see `python -m benchmarks graphs --help`."""
