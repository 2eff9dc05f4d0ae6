"""Drop-ins by compiled tables: subclasses of schedulers and guiders, and sampling functions."""
