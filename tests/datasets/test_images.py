"""What comes off the disk: odd modes, rotations, bombs and broken files."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lgvq_plugin.datasets.folder import CaptionedFolder
from lgvq_plugin.datasets.images import HashedDraws, UnreadableImage, open_image, shrink
from lgvq_plugin.datasets.listed import ImageOptions
from lgvq_plugin.sockets import ConfigError


def read(path, size=8, **options):
    return ImageOptions(size=size, **options).load(path, HashedDraws(0))


def levels(array):
    return np.rint((array + 1) * 127.5).astype(int)


def test_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).round().astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    seen = levels(read(tmp_path / "a.png"))
    assert np.abs(seen[..., 0] - ramp / 257).max() <= 0.51
    assert (seen[..., 0] == seen[..., 2]).all()


def test_cmyk_and_grey_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = levels(read(tmp_path / "a.jpg")).mean(axis=(0, 1))
    assert red[0] > 230
    assert max(red[1:]) < 25
    Image.new("L", (8, 8), 100).save(tmp_path / "b.png")
    assert (levels(read(tmp_path / "b.png")) == 100).all()


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == 1).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "b.png", transparency=0)
    assert (read(tmp_path / "b.png") == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(tmp_path, orientation):
    # The pixel that belongs to the top left is elsewhere in the file: EXIF 2.3, table 6.
    row, column = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}.get(
        orientation, {5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}.get(orientation)
    )
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[row, column] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    seen = read(tmp_path / "a.png")
    assert seen[0, 0].tolist() == [1, 1, 1]
    assert (seen == 1).sum() == 3


def png_of(width, height):
    """Return a PNG of claimed size whose data is a few bytes."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_even_where_broken_files_are_skipped(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_of(side, side))
    (tmp_path / "a.txt").write_text("a bomb")
    with pytest.raises(ConfigError, match=r"a\.png.*shrink or remove"):
        CaptionedFolder(tmp_path, skip_corrupt=True)[0]


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0\0\x10JFIF\0"])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"a\.jpg cannot be read"):
        open_image(tmp_path / "a.jpg")


def test_a_truncated_photo_is_broken(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImage, match=r"a\.jpg"):
        open_image(tmp_path / "a.jpg")


def test_the_next_good_image_takes_the_place_of_a_broken_one(tmp_path):
    for k in range(3):
        Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"number {k}")
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"1\.png.*skip_corrupt"):
        CaptionedFolder(tmp_path)[1]
    dataset = CaptionedFolder(tmp_path, skip_corrupt=True)
    assert dataset[1]["caption"] == "number 2"
    assert list(dataset.skipped) == ["1.png"]


def test_aspect_ratio_is_kept(tmp_path):
    # A circle in a wide picture stays as wide as it is high.
    y, x = np.mgrid[:100, :200]
    disc = ((x - 100) ** 2 + (y - 50) ** 2 < 40**2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "a.png")
    for crop, height in (("center", 40), ("none", 20)):
        seen = read(tmp_path / "a.png", size=50, crop=crop)[..., 0] > 0
        if crop == "none":
            assert seen[:12].all()  # white padding
            seen = seen[13:37]
        assert abs(int(seen.any(axis=0).sum()) - height) <= 2
        assert abs(int(seen.any(axis=1).sum()) - height) <= 2


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_sides_are_as_given(tmp_path, channels, first):
    pixels = np.full((40, 20, 4), (200, 100, 0, 255), np.uint8)
    pixels[20:, :, 3] = 0  # transparent below
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = read(tmp_path / "a.png", (32, 16), channels=channels, channel_first=first)
    assert seen.shape == ((channels, 32, 16) if first else (32, 16, channels))
    top, bottom = (levels(seen[..., y, 8] if first else seen[y, 8]) for y in (4, 28))
    assert top.tolist() == {1: [118], 3: [200, 100, 0], 4: [200, 100, 0, 255]}[channels]
    assert bottom[-1] == (0 if channels == 4 else 255)


def test_an_oblong_size_cuts_the_middle_at_its_own_ratio(tmp_path):
    ramp = np.arange(60, dtype=np.uint8)[None, :, None].repeat(20, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert (levels(read(tmp_path / "a.png", [20, 40]))[0, :, 0] == np.arange(10, 50)).all()
    assert (levels(read(tmp_path / "a.png", [20, 20]))[0, :, 0] == np.arange(20, 40)).all()


@pytest.mark.parametrize("options", [{"size": [8]}, {"size": 0}, {"size": "8"}, {"channels": 2}])
def test_a_size_or_number_of_channels_that_cannot_be_is_named(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ImageOptions(**options)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_broken_image_is_one_message_from_a_worker_too(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "a.txt").write_text("a dog")
    messages = []
    for workers in (0, 1):
        with pytest.raises(ConfigError) as caught:
            list(DataLoader(CaptionedFolder(tmp_path), num_workers=workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"image {tmp_path / 'a.jpg'} cannot be read")
    assert "\n" not in messages[0]


def test_shrinking_copies_what_is_small_enough_byte_for_byte(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg")
    content, suffix = shrink(tmp_path / "a.jpg", 30, square=False)
    assert (content, suffix) == ((tmp_path / "a.jpg").read_bytes(), ".jpg")


@pytest.mark.parametrize(("square", "expected"), [(False, (20, 15)), (True, (15, 15))])
def test_shrinking_keeps_the_shorter_side(tmp_path, square, expected):
    Image.new("RGBA", (40, 30), "red").save(tmp_path / "a.png")
    content, suffix = shrink(tmp_path / "a.png", 15, square=square)
    (tmp_path / "b").write_bytes(content)
    with Image.open(tmp_path / "b") as image:
        assert (image.size, image.mode, suffix) == (expected, "RGB", ".png")


@pytest.mark.slow
@pytest.mark.parametrize("exif", [b"II*\0\x08", b"XX*\0\x08\0\0\0"], ids=["short", "no TIFF"])
def test_broken_exif_is_skipped_like_any_broken_file(tmp_path, exif):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png", exif=exif)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for k in range(2):
        (tmp_path / f"{k}.txt").write_text(f"number {k}")
    assert CaptionedFolder(tmp_path, skip_corrupt=True)[0]["caption"] == "number 1"
