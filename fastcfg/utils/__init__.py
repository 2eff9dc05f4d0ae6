"""Helpers that know nothing of diffusion."""
