"""What is found in a folder, and what a picture becomes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.picture_folder import draw_folder

from fastcfg.training.folder.pictures import PictureFolder, PictureReader, to_array

pytestmark = pytest.mark.quick


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def centre(width: int = 8, height: int = 8) -> PictureReader:
    return PictureReader(width, height, "centre", 1.0, False)


def read(path: Path, reader: PictureReader | None = None) -> np.ndarray:
    return np.asarray((reader or centre()).read(path, rng()))


def test_pictures_of_all_kinds_and_their_captions(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    picture = Image.new("RGB", (4, 4), "red")
    names = ("a.png", "b/x.JPG", "b/c/y.jpeg", "d.webp", "e.bmp", "._a.png", ".cache/z.png")
    for name in names:
        picture.save(tmp_path / name)
    (tmp_path / "movie.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes("\ufeff  A café \r\n\r\n two\u2028lines \n".encode())
    (tmp_path / "b/x.txt").write_text("x")
    (tmp_path / "d.txt").write_text(" \n\n")
    (tmp_path / "other.txt").write_text("no picture's")
    found = PictureFolder(tmp_path)
    captions = {picture.path.relative_to(tmp_path).as_posix(): picture.captions for picture in found.pictures}
    assert list(captions) == ["a.png", "b/c/y.jpeg", "b/x.JPG", "d.webp", "e.bmp"]
    assert captions["a.png"] == ("A café", "two\u2028lines")
    assert captions["b/x.JPG"] == ("x",)
    assert captions["b/c/y.jpeg"] == captions["d.webp"] == captions["e.bmp"] == ()
    assert (found.uncaptioned, found.skipped) == (3, 0)
    assert found.summary() == "5 pictures, 3 without a caption (trained on unconditionally)"
    fewer = PictureFolder(tmp_path, skip_uncaptioned=True)
    assert [picture.path.name for picture in fewer.pictures] == ["a.png", "x.JPG"]
    assert fewer.summary() == "2 pictures, 3 without a caption left out"


def test_folders_without_anything_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: got .*none, which is not a folder"):
        PictureFolder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"data: got .* with no pictures, expected files named .png"):
        PictureFolder(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"data: got .* with 1 pictures, none with a caption"):
        PictureFolder(tmp_path, skip_uncaptioned=True)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"data: got .*a.txt, which is not UTF-8"):
        PictureFolder(tmp_path)
    (tmp_path / "a.txt").unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"data: got a.jpg and a.png, expected one picture for the captions of a.txt"):
        PictureFolder(tmp_path)


def test_the_fingerprint_tells_folders_apart(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "data")
    prints = [PictureFolder(folder).fingerprint]
    (folder / "0.txt").write_text("a red squark\n")
    prints.append(PictureFolder(folder).fingerprint)
    Image.new("RGB", (3, 3)).save(folder / "1.png")
    prints.append(PictureFolder(folder).fingerprint)
    (folder / "2.png").rename(folder / "deeper" / "2.png")
    prints.append(PictureFolder(folder).fingerprint)
    (folder / "deeper" / "2.png").unlink()
    prints.append(PictureFolder(folder).fingerprint)
    assert len(set(prints)) == 5
    shutil.move(folder, tmp_path / "moved")
    (tmp_path / "moved" / "notes.md").write_text("not a picture")
    assert PictureFolder(tmp_path / "moved").fingerprint == prints[-1]


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    assert (read(path) == 255).all()
    Image.new("RGBA", (8, 8), (255, 0, 0, 102)).save(path)
    assert (read(path) == [255, 153, 153]).all()
    Image.new("LA", (8, 8), (10, 0)).save(path)
    assert (read(path) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    palette.save(path)
    assert (read(path) == [9, 99, 199]).all()
    palette.save(path, transparency=1)
    assert (read(path) == 255).all()


def test_modes_that_are_not_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (read(tmp_path / "deep.png") == round(40000 / 257)).all()
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert (read(tmp_path / "grey.png") == 77).all()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, *rest = read(tmp_path / "print.jpg")[4, 4]
    assert red > 240
    assert max(rest) < 15


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    turned = read(tmp_path / "a.png")
    assert (turned[:, 4:] == 255).all()
    assert (turned[:, :4] == 0).all()


def test_the_centre_crop_is_the_middle_resized_bicubically(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    wide = Image.fromarray(rng().integers(0, 256, (20, 64, 3), dtype=np.uint8))
    wide.save(path)
    # By width and height: the whole picture at that scale, and where its middle begins. Cutting before resizing would
    # give other pixels at the crop's edges.
    for size, whole, left in (((10, 10), (32, 10), 11), ((10, 5), (16, 5), 3), ((6, 10), (32, 10), 13)):
        expected = np.asarray(wide.resize(whole, Image.Resampling.BICUBIC))[:, left : left + size[0]]
        assert np.array_equal(read(path, centre(*size)), expected)
    wide.transpose(Image.Transpose.TRANSPOSE).save(path)
    tall = np.asarray(wide.resize((32, 10), Image.Resampling.BICUBIC))[:, 11:21].transpose(1, 0, 2)
    assert np.array_equal(read(path, centre(10, 10)), tall)


@pytest.mark.parametrize(
    ("crop", "ratio", "decoded"), [("centre", 0.1, 100), ("random", 1.0, 100), ("random", 0.2, 200)]
)
def test_large_jpegs_are_decoded_no_larger_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crop: str, ratio: float, decoded: int
) -> None:
    smooth = Image.fromarray(rng().integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((1064, 800), Image.BICUBIC)
    smooth.save(tmp_path / "a.png")
    smooth.save(tmp_path / "a.jpg", quality=95, subsampling=0)
    sizes = []
    box = PictureReader._box
    monkeypatch.setattr(
        PictureReader, "_box", lambda self, size, place: sizes.append(size[1]) or box(self, size, place)
    )
    reader = PictureReader(40, 40, crop, ratio, False)
    exact, jpeg = (np.asarray(reader.read(tmp_path / name, rng()), dtype=float) for name in ("a.png", "a.jpg"))
    # Needed are 80 of the smallest crop's rows, which are a share of all of ratio ** 0.5.
    assert sizes == [800, decoded]
    # Measured: at most 2 of 255.
    assert np.abs(exact - jpeg).max() < 4


def crops(path: Path, reader: PictureReader, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Left edge and width of crops of a picture whose red is the column, measured on them."""
    rows = np.stack([np.asarray(reader.read(path, rng(seed)))[8, :, 0].astype(float) for seed in range(count)])
    step = (rows[:, 12] - rows[:, 3]) / 9
    return rows[:, 3] - 3 * step - (step - 1) / 2, step * 16


def test_random_crops_have_the_sizes_asked_for_and_lie_anywhere(tmp_path: Path) -> None:
    columns = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (64, 240, 3))
    Image.fromarray(np.ascontiguousarray(columns)).save(tmp_path / "a.png")
    left, width = crops(tmp_path / "a.png", PictureReader(16, 16, "random", 0.25, False))
    # The largest crop is 64 wide, a quarter of its area 32. Measured on rounded pixels: within 1.
    assert width.min() == pytest.approx(32, abs=1.5)
    assert width.max() == pytest.approx(64, abs=1.5)
    # The share of the area is uniform from a quarter to 1: the standard deviation of its mean is 0.0125.
    assert abs(((width / 64) ** 2).mean() - 0.625) < 0.04
    assert left.min() < 8
    assert (left + width).max() > 232
    place = left / (240 - width)
    assert abs(place.mean() - 0.5) < 0.06
    assert abs(place.std() - 12**-0.5) < 0.03
    _, whole = crops(tmp_path / "a.png", PictureReader(16, 16, "random", 1.0, False), 20)
    np.testing.assert_allclose(whole, 64, atol=1.5)


def test_half_of_the_pictures_are_mirrored_where_asked(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, 4:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    flipped = PictureReader(8, 8, "centre", 1.0, True)
    left = np.mean([np.asarray(flipped.read(tmp_path / "a.png", rng(seed)))[0, 0, 0] == 255 for seed in range(200)])
    assert abs(left - 0.5) < 0.1  # binomial: the standard deviation is 0.035
    assert all(np.asarray(centre().read(tmp_path / "a.png", rng(seed)))[0, 0, 0] == 0 for seed in range(20))


def test_pixels_become_numbers_between_minus_one_and_one() -> None:
    array = to_array(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
    assert array.dtype == np.float32
    assert array.shape == (3, 1, 1)
    np.testing.assert_allclose(array.ravel(), [-1, 1, -0.6], atol=1e-7)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_pictures_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes({"cut": path.read_bytes()[:900], "text": b"<html>not found</html>", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"data: got .*a.jpg, which cannot be read \(.+\), expected a picture"):
        centre().read(path, rng())
