"""Benchmarks of fastcfg, run from a checkout: `python -m benchmarks` lists them."""
