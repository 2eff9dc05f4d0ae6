"""Drop-ins that fuse: subclasses of schedulers and guiders, and sampling functions, on their compiled tables."""
