"""Diffusion objects changed at random, and calls of their loops."""
