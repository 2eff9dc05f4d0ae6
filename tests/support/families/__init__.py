"""Stand-ins for guided-diffusion and the projects that changed their copy of it, written for these tests: each has its
project's interface, and what it changed."""
