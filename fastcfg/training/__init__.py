"""Training for classifier-free guidance: captioned shapes, the hybrid loss, the loop, and a judge of the results."""
