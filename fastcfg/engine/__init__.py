"""The engine: `Sampler`, its memory and programs, and the one sampling loop."""
