"""Training on a user's own pictures: a folder of them, with captions in text files of the same names."""

from .pictures import Picture, PictureFolder, PictureReader, to_array

__all__ = ["Picture", "PictureFolder", "PictureReader", "to_array"]
