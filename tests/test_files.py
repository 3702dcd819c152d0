"""Files that are whole or not there, and what is read of them; one writer a folder."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, deny, flips, make_run

from resnet import files
from resnet.command import InputError


@pytest.mark.usefixtures("handlers")
def test_a_run_folder_has_one_writer_and_keeps_no_leftovers_of_killed_ones(dataset, tmp_path):
    run = make_run(dataset, tmp_path)
    run.folder.mkdir()
    left = run.folder / ".snapshot_iter_4.npz.123.tmp"
    left.write_bytes(b"half")
    (run.folder / "writable").mkdir()  # whatever else is wrong, who writes there comes first
    of_log_report = run.folder / "log3_abc9zz"
    of_the_user = run.folder / "lognotes1234"
    for folder, name in (of_log_report, "log.json"), (of_the_user, "mine"):
        folder.mkdir()
        (folder / name).touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from resnet import files\n"
         "with files.only_writer(Path(sys.argv[1])): print(); input()", run.folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    holder.stdout.readline()
    with pytest.raises(InputError, match=f"process {holder.pid} on .* is writing to it; legal:"):
        run.train()
    assert not (run.folder / "log").exists()
    holder.kill()  # the system gives the right back
    holder.communicate()
    (run.folder / "writable").rmdir()
    run.train()
    assert (run.folder / "blocks.h5").exists() and not left.exists()
    assert not of_log_report.exists() and (of_the_user / "mine").exists()


def test_a_lock_that_is_no_longer_the_folders_gives_no_right(tmp_path, monkeypatch):
    def of_another_process(*_):
        (tmp_path / files.LOCK).unlink()
        (tmp_path / files.LOCK).touch()

    monkeypatch.setattr(fcntl, "flock", of_another_process)
    with pytest.raises(InputError, match="made it anew; legal:"), files.only_writer(tmp_path):
        pass


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "log"
    for content in (b"first", b"second, and longer"):
        with files.whole(path) as temporary:
            assert temporary.parent == tmp_path and temporary != path
            temporary.write_bytes(content)
        assert path.read_bytes() == content
    with pytest.raises(KeyError), files.whole(str(path)) as temporary:
        temporary.write_bytes(b"hal")
        raise KeyError
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["log"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "log"
    with pytest.raises(FileNotFoundError) as error, files.whole(path) as temporary:
        temporary.write_bytes(b"")
    assert error.value.filename == str(path)  # and not the temporary one


def test_what_is_sealed_is_given_back_and_any_change_is_noticed(tmp_path):
    path, content = tmp_path / "file", b"weights\n" * 20
    for body in (b"", files.seal(b"another file") + content, content):
        path.write_bytes(files.seal(body))
        assert files.read_sealed(path) == (body, True)
    whole = files.seal(content)
    for changed in (whole[:-1], whole + b"\n", *(changed for _, changed in flips(path))):
        path.write_bytes(changed)
        if files.SEAL in changed:
            with pytest.raises(ValueError, match="sha256 differs"):
                files.read_sealed(path)
        else:  # as of before there was a digest; what was sealed must say so within
            assert files.read_sealed(path) == (changed, False)


def test_what_can_be_made_again_is_read_only_if_it_is_whole(tmp_path):
    path = tmp_path / "code"
    assert files.read_if_whole(path) is None
    files.write(path, files.seal(b"code"))
    assert files.read_if_whole(path) == b"code"
    for damaged in (b"code", path.read_bytes()[:-1], path.read_bytes().replace(b"code", b"node")):
        path.write_bytes(damaged)
        assert files.read_if_whole(path) is None
    assert files.read_if_whole(tmp_path) is None  # a folder


def test_what_might_never_end_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            files.read(path)
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read(tmp_path / "file") == b"12345"
    monkeypatch.setattr(files, "LARGEST", 4)
    with pytest.raises(OSError, match="larger than 4 bytes"):
        files.read(tmp_path / "file")


def test_json_that_cannot_be_read_is_one_line(tmp_path):
    path = tmp_path / "args.json"
    with pytest.raises(FileNotFoundError):
        files.read_json(path)
    files.write_json(path, {"n": 3})
    assert files.read_json(path) == {"n": 3}
    for content in (b"", b"[" * 100_000, b"\xff", b'{"n":\n3'):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            files.read_json(path)
        assert type(error.value) is ValueError and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not a regular file"):
        files.read_json(tmp_path)


def test_what_cannot_be_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    path.write_text("{}")
    deny(monkeypatch, path)
    message = f"^{path}: cannot be read \\(Permission denied\\); legal: a readable file$"
    for read in (files.read_json, files.read_sealed):
        with pytest.raises(InputError, match=message), files.parsing():
            read(path)
