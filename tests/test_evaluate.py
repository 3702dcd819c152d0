"""Images as a network sees them, whatever their files are."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import deny
from PIL import Image

from resnet.command import InputError
from resnet.evaluate import print_classes, print_evaluation, read_image, recorded_data


def ramp(most, dtype):
    """A grey picture that becomes lighter from left to right."""
    return np.tile(np.linspace(0, most, 64), (64, 1)).astype(dtype)


EIGHT = ramp(255, np.uint8)


def seen(image, path, **options):
    image.save(path, **options)
    return read_image(path).astype(int)


def expected():
    image = Image.fromarray(EIGHT).resize((32, 32), Image.Resampling.BOX)
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_pictures_of_16_bits_are_as_light_as_those_of_8(tmp_path, name):
    image = Image.fromarray(ramp(65535, np.uint16))
    assert abs(seen(image, tmp_path / name) - expected()).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_shows_its_picture(tmp_path, mode):
    image = Image.fromarray(EIGHT).convert("RGB").convert(mode)
    name = "a.tif" if mode in ("CMYK", "YCbCr", "HSV") else "a.png"
    try:
        found = seen(image, tmp_path / name)
    except OSError:
        pytest.skip("this Pillow cannot write it")
    tolerance = {"1": 130, "P": 20}.get(mode, 6)  # dithered, and a palette of few greys
    assert abs(found - expected()).max() <= tolerance


def test_what_is_transparent_becomes_white(tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert seen(image, tmp_path / "a.png").min() == 255
    image = Image.new("LA", (32, 32), (0, 128))
    assert (abs(seen(image, tmp_path / "b.png") - 127) <= 1).all()
    image = Image.new("RGB", (32, 32), (10, 20, 30)).quantize(4)
    index = image.getpixel((0, 0))
    assert seen(image, tmp_path / "c.png", transparency=index).min() == 255
    image = Image.new("RGB", (32, 32), (1, 2, 3))
    assert seen(image, tmp_path / "d.png", transparency=(1, 2, 3)).min() == 255


@pytest.mark.parametrize("array", [ramp(1, np.float32), ramp(2**31 - 1, np.int32)])
def test_numbers_without_a_known_white_are_refused(tmp_path, array):
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="numbers of 32 bits"):
        read_image(tmp_path / "a.tif")


def chunk(kind, content):
    end = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + end


def test_bombs_are_one_line(tmp_path):
    start = b"\x89PNG\r\n\x1a\n"
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << 30, 1 << 30, 8, 2, 0, 0, 0))
    large = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
    for content in (small + text, huge, large + chunk(b"IDAT", zlib.compress(b""))):
        path = tmp_path / "bomb.png"
        path.write_bytes(start + content)
        with pytest.raises(InputError, match=r"not a readable image") as error:
            read_image(path)
        assert "\n" not in str(error.value)


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "AVIF", "JPEG2000", "DDS"]


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_and_changed_files_are_one_line_or_a_picture(tmp_path, kind):
    path = tmp_path / "image"
    try:
        Image.fromarray(EIGHT).convert("RGB").save(path, format=kind)
    except (KeyError, OSError):
        pytest.skip("this Pillow cannot write it")
    whole = path.read_bytes()
    rng = np.random.RandomState(0)
    for _ in range(40):
        content = bytearray(whole[: rng.randint(len(whole) + 1)])
        for place in rng.randint(0, len(whole), 3):
            if place < len(content):
                content[place] = rng.randint(256)
        path.write_bytes(content)
        try:
            assert read_image(path).shape == (3, 32, 32)
        except InputError as error:
            assert str(error).startswith(f"--images {path}: ") and "\n" not in str(error)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, tmp_path / "none.png"):
        with pytest.raises(InputError, match=f"--images {path}"):
            read_image(path)


def test_what_is_no_image_is_told_without_objects_in_memory(tmp_path):
    path = tmp_path / "a.png"
    for content in (b"root:x:0:0:root:/root:/bin/bash", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"image \(none of the .*legal: PNG, ") as error:
            read_image(path)
        assert "object at 0x" not in str(error.value)


def test_no_format_that_starts_a_program_is_read(tmp_path):
    path = tmp_path / "a.eps"
    Image.fromarray(EIGHT).save(path)
    with pytest.raises(InputError, match="not a readable image"):
        read_image(path)


def test_without_a_record_that_can_be_read_nobody_knows_where_the_images_were(
    tmp_path, monkeypatch
):
    record = tmp_path / "args.json"
    record.write_text(json.dumps({"starts": [{"data": str(tmp_path)}]}))
    assert recorded_data(tmp_path / "blocks.h5") == str(tmp_path)
    deny(monkeypatch, record)
    assert recorded_data(tmp_path / "blocks.h5") is None


CLASSES = ("cat", "dog", "frog", "ship")


def test_rows_of_the_confusion_matrix_are_the_true_classes(capsys):
    print_evaluation(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0]), CLASSES)
    first, *_, head, cat, dog, frog, ship = capsys.readouterr().out.splitlines()
    assert first == "accuracy: 40.00% (2 of 5 images)"
    assert head.split() == [*CLASSES, "accuracy"]
    assert [row.split() for row in (cat, dog, frog, ship)] == [
        ["cat", "1", "2", "0", "0", "33.33%"],
        ["dog", "0", "1", "0", "0", "100.00%"],
        ["frog", "1", "0", "0", "0", "0.00%"],
        ["ship", "0", "0", "0", "0", "-"],
    ]


def test_of_an_image_the_likeliest_classes_are_told_with_their_probabilities(capsys):
    print_classes([Path("a.png")], np.array([[0, 2, 1, -1]], np.float32), CLASSES)
    assert capsys.readouterr().out == "a.png: dog 64.4%, frog 23.7%, cat 8.7%\n"
