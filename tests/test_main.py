"""Every command under one name."""

from conftest import ROOT, python


def test_one_command_has_all_of_them(tmp_path):
    words = {"cwd": tmp_path, "PYTHONPATH": str(ROOT)}
    listed = python("-m", "resnet", "--help", **words).stdout
    for name in listed.split(": ")[-1].strip().split(", "):
        done = python("-m", "resnet", name, "--help", **words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ") and name in done.stdout
    done = python("-m", "resnet", "train", **words)
    assert done.returncode == 2 and "found 'train', legal: " in done.stderr
