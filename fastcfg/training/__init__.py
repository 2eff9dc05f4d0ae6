"""Training for classifier-free guidance: the loop and its hybrid loss, for captioned shapes or a folder of pictures."""
