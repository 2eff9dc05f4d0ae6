"""A folder of pictures with captions in text files, and a reader that crops pictures at random."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a folder, and its captions: the stripped non-blank lines of its `.txt`; none without such a file."""

    path: Path
    captions: tuple[str, ...]


class PictureFolder:
    """The pictures of a folder and its subfolders, sorted by name, with their captions.

    `skip_uncaptioned` leaves out `pictures` without a caption; `uncaptioned` and `skipped` count those found and left
    out. `fingerprint` is the SHA-256 of names, sizes in bytes, and captions: another picture of the same size goes
    unnoticed. ValueError for no folder, no pictures in it, two that share a caption file, or a caption not in UTF-8.
    """

    def __init__(self, folder: str | os.PathLike[str], *, skip_uncaptioned: bool = False) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data: got {os.fspath(folder)}, which is not a folder, expected one with pictures")
        listed = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if _is_picture(path, root))
        digest, found = hashlib.sha256(), []
        stems: dict[str, str] = {}
        for name in listed:
            stem, path = name.rpartition(".")[0], root / name
            if (other := stems.setdefault(stem, name)) != name:
                raise ValueError(f"data: got {other} and {name}, expected one picture for the captions of {stem}.txt")
            captions = _read_captions(path.with_suffix(".txt"))
            digest.update(ascii((name, path.stat().st_size, captions)).encode())
            found.append(Picture(path, captions))
        self.pictures = [picture for picture in found if picture.captions or not skip_uncaptioned]
        self.uncaptioned = sum(not picture.captions for picture in found)
        self.skipped = len(found) - len(self.pictures)
        self.fingerprint = digest.hexdigest()
        if not self.pictures:
            kinds = ", ".join(SUFFIXES)
            got = f"{len(found)} pictures, none with a caption" if found else "no pictures"
            raise ValueError(f"data: got {os.fspath(folder)} with {got}, expected files named {kinds} and their .txt")

    def summary(self) -> str:
        """The numbers of pictures and captions, in words."""
        words = f"{len(self.pictures)} pictures"
        if self.skipped:
            words += f", {self.skipped} without a caption left out"
        elif self.uncaptioned:
            words += f", {self.uncaptioned} without a caption (trained on unconditionally)"
        return words


class PictureReader:
    """Reads pictures and crops them to one size, `width` by `height`; safe to call from several threads.

    A picture is turned by its EXIF orientation, composed on white if transparent, cropped, and resized bicubically with
    antialiasing. (torchvision's `RandomResizedCrop`, used by glide-finetune, crops a share of the whole picture's area
    instead, so that long pictures always lose their ends, and resizes bilinearly.) The other arguments are those of
    `FolderConfig`.
    """

    def __init__(self, width: int, height: int, crop: str, resize_ratio: float, random_hflip: bool) -> None:
        self._size, self._random = (width, height), crop == "random"
        self._resize_ratio, self._flip = resize_ratio, random_hflip

    def read(self, path: Path, rng: np.random.Generator) -> Image.Image:
        """Read and crop a picture as RGB, or ValueError. `rng` draws crop and mirroring: always four numbers."""
        position, flip = rng.random(3), bool(rng.random() < 0.5)
        try:
            with Image.open(path) as file:
                # JPEG decodes faster at a half, quarter or eighth of its size: 12 megapixels for a 64-pixel crop take
                # 0.32 s at full size.
                file.draft(None, self._enough(file.size))
                picture = _on_white(ImageOps.exif_transpose(file))
        except Exception as error:  # Pillow passes on any exception of its decoders
            raise ValueError(f"data: got {path}, which cannot be read ({error}), expected a picture") from error
        picture = picture.resize(self._size, Image.Resampling.BICUBIC, box=self._box(picture.size, position))
        return ImageOps.mirror(picture) if self._flip and flip else picture

    def _enough(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size at which a picture, turned or not, still has twice the resolution its smallest crop needs."""
        width, height = self._size
        least = min(min(size) / max(width, height), min(size[0] / width, size[1] / height))
        least *= self._resize_ratio**0.5 if self._random else 1.0
        return math.ceil(2 * size[0] / least), math.ceil(2 * size[1] / least)

    def _box(self, size: tuple[int, int], position: np.ndarray) -> tuple[float, float, float, float]:
        """The crop: left, upper, right and lower edge."""
        width, height = size
        scale = min(width / self._size[0], height / self._size[1])
        x = y = 0.5
        if self._random:
            area, x, y = position.tolist()
            scale *= (self._resize_ratio + (1 - self._resize_ratio) * area) ** 0.5
        crop_width, crop_height = scale * self._size[0], scale * self._size[1]
        left, upper = x * (width - crop_width), y * (height - crop_height)
        # resize refuses an edge that rounding puts beyond the picture.
        return left, upper, min(left + crop_width, width), min(upper + crop_height, height)


def to_array(picture: Image.Image) -> np.ndarray:
    """Pixels of an RGB picture, float32 [3, H, W] in [-1, 1]."""
    return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)


def _on_white(picture: Image.Image) -> Image.Image:
    """The picture as RGB, composed on white."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
        return Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def _is_picture(path: Path, root: Path) -> bool:
    """Whether a path is a picture by its name, and not hidden below the root (macOS writes `._name.jpg`)."""
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _read_captions(path: Path) -> tuple[str, ...]:
    """The non-blank lines of a caption file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ()
    except UnicodeDecodeError as error:
        got = f"{path}, which is not UTF-8 ({error.reason})"
        raise ValueError(f"data: got {got}, expected captions, one a line") from None
    return tuple(line.strip() for line in text.split("\n") if line.strip())
