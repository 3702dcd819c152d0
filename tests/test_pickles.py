"""Pickles: those of every Python and protocol are read, and nothing that they name is called."""

import os
import pickle
import struct
import warnings

import pytest
from test_cifar10 import NAMES, assert_same_images, batch, refusal, write

from resnet import cifar10


def python2_pickle(record):
    """What Python 2 and an old NumPy write: strings without an encoding, flags as 0 and 1."""

    def string(text):
        return b"T" + struct.pack("<i", len(text)) + text

    x = record[b"data"]
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR"
        b"(I1\n(" + b"".join(b"I%d\n" % n for n in x.shape) + b"t"
        b"cnumpy\ndtype\n(" + string(b"u1") + b"I0\nI1\ntR"
        b"(I3\n" + string(b"|") + b"NNNI-1\nI-1\nI0\ntb"
        b"I00\n" + string(x.tobytes()) + b"tb"
    )
    labels = b"(" + b"".join(b"I%d\n" % label for label in record[b"labels"]) + b"l"
    return b"(" + string(b"data") + array + string(b"labels") + labels + b"d."


def test_files_as_python_2_wrote_them(tmp_path):
    content = {name: python2_pickle(batch(seed)) for seed, name in enumerate(NAMES)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy 2.4 warns of such flags
        assert_same_images(cifar10.load(str(write(tmp_path, content))))


def test_files_as_python_2_wrote_them_in_its_text_protocol(tmp_path):
    def string(text):
        return b"S" + repr(text)[1:].encode() + b"\n"

    content = {}
    for seed, name in enumerate(NAMES):
        x = batch(seed)[b"data"].tobytes()
        binary = b"T" + struct.pack("<i", len(x)) + x
        content[name] = python2_pickle(batch(seed)).replace(binary, string(x))
        assert content[name] != python2_pickle(batch(seed))
    assert_same_images(cifar10.load(str(write(tmp_path, content))))


def test_files_with_text_keys(tmp_path):
    content = {}
    for seed, name in enumerate(NAMES):
        record = {key.decode(): value for key, value in batch(seed).items()}
        content[name] = pickle.dumps(record, protocol=4)
    assert_same_images(cifar10.load(str(write(tmp_path, content))))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("keys", [bytes, str])
def test_files_of_every_protocol_of_python_3(tmp_path, protocol, keys):
    content = {}
    for seed, name in enumerate(NAMES):
        record = {key if keys is bytes else key.decode(): x for key, x in batch(seed).items()}
        record[keys(b"filenames") if keys is bytes else "filenames"] = [b"a.png"] * 20
        content[name] = pickle.dumps(record, protocol=protocol)
    assert_same_images(cifar10.load(str(write(tmp_path, content))))


@pytest.mark.parametrize(
    "call",
    [
        b"cos\nsystem\n(S'touch %s'\ntR.",
        b"cposix\nsystem\n(S'touch %s'\ntR.",
        b"cbuiltins\nopen\n(S'%s'\nS'w'\ntR.",
        b'c__builtin__\neval\n(S\'open("%s", "w")\'\ntR.',
        b"(S'%s'\nS'w'\niio\nopen\n.",
        b"cnumpy\nfromfile\n(S'%s'\ntR.",
        b"cnumpy\nmemmap\n(S'%s'\nS'u1'\nS'w+'\nI0\n(I1\nttR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'%s'\ntR.",
    ],
)
def test_a_pickle_cannot_run_anything(tmp_path, call):
    trace = tmp_path / "trace"
    content = call % os.fsencode(trace)
    refusal(write(tmp_path / "f", {"data_batch_1": content}), "data_batch_1", "not allowed")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\ndtype\n(S'nonsense'\ntR.",
        b"cnumpy\ndtype\n(I1\nI2\nI3\nI4\nI5\ntR.",
        b"cnumpy\nndarray\n(I-1\ntR.",
        b"cnumpy\nndarray\n((I99999999\nI99999999\nI99999999\nttR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
        b"cnumpy\nndarray\n(I3\ntR(I1\n(I9\ntI0\nI0\nI0\ntb.",
        b"cnumpy\nndarray\n}S'x'\nI1\nsb.",
        b"cnumpy\nndarray\n)R.",
        b"(" * 10000 + b"t" * 10000 + b".",
        b"P1\n.",
        # State that NumPy takes for its own: it crashes at an address that the file chooses.
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb.",
        b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt}S'a'\n(I7\nI7\ntsI9\nI1\nI1\ntb.",
        b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb.",
        b"(S'data'\n" + b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntb" + b"d.",
        b"r\xff\xff\xff\x7f.",  # a memo of 16 GiB
        b"Nr\xff\xff\xff\x7f.",
        b"\x8e" + b"\xff" * 7 + b"\x0f.",  # an endless text
        b"(lp0\n" + b"(g0\ng0\nlp0\n" * 60 + b".",  # lists in lists, 2**60 in all
        b"}((tp0\n" + b"0(g0\ng0\ntp0\n" * 60 + b"Nsd.",
        b"})" + b"q\x00h\x00\x86" * 60 + b"Ns.",  # a key that is hashed for 2**60 steps
        b"cbuiltins\ngetattr\n.",
        b"\x80\x02}U\x04dataL" + b"9" * 10_000 + b"L\ns.",
    ],
)
def test_odd_calls_of_what_is_allowed(tmp_path, content):
    refusal(write(tmp_path, {"data_batch_1": content}), tmp_path / "data_batch_1")
