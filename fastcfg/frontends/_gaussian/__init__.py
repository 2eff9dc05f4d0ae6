"""The Gaussian diffusion process of guided-diffusion and GLIDE, and their sampling loops on the engine."""
