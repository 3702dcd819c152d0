"""What a user of a command meets: errors in one line, after what was printed before them."""

import subprocess
import sys

import pytest
from conftest import ROOT, python


def test_an_error_stands_after_what_was_printed_before_it():
    code = """from resnet import command
def main():
  print("before")
  raise command.InputError("the error")
command.run(main)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.stdout == "before\nerror: the error\n"


def test_an_error_is_one_line_whatever_names_a_file_has():
    script = "from resnet import command\ndef f(): raise command.InputError('a\\nb\\x1b[2J')\n"
    shown = python("-c", f"{script}command.run(f)", PYTHONPATH=".")
    assert (shown.returncode, shown.stderr) == (1, "error: a\\nb\\x1b[2J\n")


def test_text_that_a_terminal_cannot_show_is_escaped(tmp_path):
    script = "from resnet import command; command.run(lambda: print('91 \\u00b1 2 \\ud800'))"
    shown = python("-c", script, PYTHONIOENCODING="ascii", PYTHONPATH=".")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "91 \\xb1 2 \\ud800\n", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_whose_output_is_closed_goes_on(closed, tmp_path):
    code = (
        "import sys; from resnet import command\n"
        "def go_on():\n"
        "    print('out', flush=True); print('error', file=sys.stderr)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w')\n"
        "command.run(go_on)"
    )
    words = ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, code]
    subprocess.run(words, cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "done").exists()
