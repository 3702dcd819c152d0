"""Arrays from a file: another name, type, shape or value, and a file that lies, are noticed."""

import io
import zipfile

import numpy as np
import pytest

from resnet import arrays
from resnet.arrays import Kind


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "w: found nothing, legal: float32 (2, 3)"),
        ({"w": Kind("float32", (3, 2))}, r"w: found float32 (3, 2), legal: float32 (2, 3)"),
        ({"w": Kind("float64", (2, 3))}, r"w: found float64 (2, 3), legal: float32 (2, 3)"),
        ({"v": Kind("float32", ())}, "w: found nothing, legal: float32 (2, 3)"),
        (
            {"w": Kind("float32", (2, 3)), "v": Kind("int64", (1,))},
            "v: found int64 (1,), legal: nothing",
        ),
    ],
)
def test_the_first_array_that_is_another_is_named(found, message):
    expected = {"w": Kind.of(np.zeros((2, 3), "f"))}
    arrays.compare(expected, expected)
    with pytest.raises(ValueError) as error:
        arrays.compare(found, expected)
    assert str(error.value) == message


def test_a_text_is_one_of_any_length():
    short, long = (Kind.of(np.array(text)) for text in ("", "a log of many epochs"))
    arrays.compare({"log": short}, {"log": long})


def test_values_that_no_training_gives_are_named():
    good = {"conv1/bn/avg_var": [0, 2.5], "t": 0, "iteration": 7, "a/_snapshot_elapsed_time": 0.5}
    diverged = {"fc/W": [np.nan, -np.inf], "conv1/bn/avg_var": [np.nan]}
    for values in (good, diverged):
        arrays.check_values({name: np.array(value) for name, value in values.items()})
    for name, value in (("conv1/bn/avg_var", [1, -1e-9]), ("t", -1), ("updater/lr", -0.1)):
        with pytest.raises(ValueError, match=f"{name}: found -.*, legal: from 0 up"):
            arrays.check_values({"fc/W": np.ones(1), name: np.array(value)})


ARRAYS = {"a/W": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3), "log": "[]"}


def saved(save=np.savez, **values):
    file = io.BytesIO()
    save(file, **values)
    return file.getvalue()


def zipped(*members):
    """A file of ``np.savez`` with these members, (name, bytes) each."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def member(array, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_was_saved_is_read(save):
    found = arrays.read_npz(saved(save, **ARRAYS))
    assert found.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert Kind.of(found[name]) == Kind.of(np.asarray(value))
        np.testing.assert_array_equal(found[name], value)


W = member(ARRAYS["a/W"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(("W.npy", W.replace(b"(2, 3)", b"(2, 2)"))), "W: .* does not have 152 bytes"),
        (zipped(("W.npy", W.replace(b"(2, 3)", b"(2, 4)"))), "W: .* does not have 152 bytes"),
        (zipped(("W.npy", W.replace(b"<f4", b"<f8"))), r"W: float64 \(2, 3\) does not have"),
        (zipped(("W.npy", W + b"?")), "W: .* does not have 153 bytes"),
        (zipped(("V.npy", W), ("W.npy", W)).replace(b"V.npy", b"W.npy"), "two arrays of one name"),
        (zipped(("W.npy", W), ("W", W)), "two arrays of one name"),
        (zipped(("W.npy", member(np.zeros(1), (2, 0)))), r"version \(2, 0\) of NumPy's format"),
        (zipped(("W.npy", member(np.array([{}])))), "."),
        (zipped(("W.npy", b"no array")), "."),
        (saved(**ARRAYS).replace(W, W[:-1] + b"?"), "Bad CRC-32"),
        (saved(**ARRAYS)[:-9], "."),
        (b"", "."),
    ],
    ids=["fewer values", "more values", "wider values", "a byte more", "a name twice",
         "a name with and without its ending", "version", "object", "text", "flipped", "cut",
         "empty"],
)  # fmt: skip
def test_a_file_that_is_not_what_its_headers_say_is_refused(content, message):
    with pytest.raises(Exception, match=message):
        arrays.read_npz(content)


def test_a_file_of_more_than_a_machine_holds_is_refused_before_it_is_unpacked(monkeypatch):
    content = saved(np.savez_compressed, W=np.zeros(100_000))
    assert len(content) < 10_000
    monkeypatch.setattr(arrays, "LARGEST", 700_000)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"arrays of 800,128 bytes, legal: up to 700,000"):
        arrays.read_npz(content)
