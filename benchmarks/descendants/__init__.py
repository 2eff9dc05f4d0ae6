"""Checkouts of projects that carry a changed copy of guided-diffusion's sampling, run beside `fastcfg.accelerate`."""
