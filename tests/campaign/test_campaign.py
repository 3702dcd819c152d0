"""Thousands of hostile cases: kills, full disks, damaged files, wrong flags, signals.

``make campaign`` runs all of them, CAMPAIGN_PART=0.05 a twentieth. Cases are drawn with a fixed
seed; the counts of each area are printed at the end.
"""

import functools
import io
import json
import os
import pickle
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import chainer
import h5py
import harness
import matplotlib.pyplot  # noqa: F401 once, and not in each child
import numpy as np
import pytest
from conftest import ROOT
from harness import (
    BAD,
    COUNTS,
    child,
    count,
    damage,
    damage_json,
    mutants,
    read_damaged,
    some,
    table,
    verdict,
)
from PIL import Image

from plots import logs
from resnet import (
    cifar10,
    evaluate,
    files,
    flags,
    record,
    stopping,
    synthetic,
    training,
    weights,
)
from resnet.command import InputError
from resnet.partial_training import PartialTraining

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print(f"\n{table()}")


@pytest.fixture(autouse=True)
def nothing_bad():
    before = dict(COUNTS)
    yield
    for area in COUNTS.keys() - before:
        assert not any(COUNTS[area][word] for word in BAD), f"\n{table()}"


def test_the_campaign_sees_what_it_looks_for(monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 1)

    def read(number, content):
        match content:
            case b"refused":
                raise InputError("no")
            case b"traceback":
                raise TypeError
            case b"hang":
                time.sleep(5)
            case b"crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case b"code":
                os.system("true")
        return content

    words = ["intact", "traceback", "refused", "hang", "crash", "code", "changed", "intact"]
    read_damaged("harness", read, [word.encode() for word in words], lambda each: each == b"intact")
    assert COUNTS.pop("harness") == Counter(words)
    assert verdict(*child(lambda: 1 / 0)) == "traceback"
    assert verdict(*child(lambda: time.sleep(5))) == "hang"
    assert verdict(*child(lambda: os.abort())) == "crash"
    assert verdict(*child(lambda: read(0, b"refused"), lambda: limit_files(2))) == "refused"


def limit_files(size):
    """Let no file grow beyond ``size`` bytes, which stands for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@functools.cache
def tiny():
    arrays = synthetic.make(8, 4)
    names = tuple("abcdefghij")
    return cifar10.Dataset("tiny", *arrays, names, "made by the tests", cifar10.digest(*arrays))


@pytest.fixture(scope="module", autouse=True)
def one_record():
    """Ask for packages and commit once: half of the time of so short a training."""
    packages, git = record.packages(), record.git_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "packages", lambda: packages)
        patch.setattr(record, "git_state", lambda: git)
        yield


EXPERIMENTS = ("plain", "resnet", "resresnet", "top-down", "bottom-up")


def make_run(experiment, out):
    """A run of a few iterations, with a snapshot after each."""
    parser = flags.add_schedule(flags.parser(""))
    words = ["--n", "1", "-b", "4", "--epoch", "2", "--snapshot-interval", "0", "--out", str(out)]
    args = parser.parse_args([*words, "--warmup", "off"])
    args.stage, args.scale, args.freeze, args.new_ends = None, 1.0, False, False
    setting = training.Setting(args, tiny(), "test", chainer.get_device("@numpy"), "chainer")
    kind = training.whole_network if experiment in EXPERIMENTS[:3] else PartialTraining
    return kind(experiment, 1, 0, setting)


def train(experiment, out):
    run = make_run(experiment, out)
    with run.setting.request:
        run.train()


def result(folder):
    """All that a run has reached but its times; None where it is not complete."""
    try:
        log = json.loads((folder / "log").read_text())
        for entry in log:
            del entry["elapsed_time"]
        found = [json.dumps(log).encode()]
        with h5py.File(folder / "blocks.h5") as file:
            file.visititems(
                lambda name, item: found.append(item[()].tobytes()) if hasattr(item, "dtype") else 0
            )
        return found
    except (OSError, ValueError, KeyError):
        return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted result of an experiment, and its run folder."""

    @functools.cache
    def made(experiment):
        out = tmp_path_factory.mktemp(experiment)
        status, said = child(lambda: train(experiment, out))
        assert status == 0, said
        folder = make_run(experiment, out).folder
        return result(folder), folder

    return made


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile")  # audit events


def at_each_change(folder, act):
    """Have ``act`` called with 1, 2, 3 ... before each change of a file in ``folder``."""
    number = 0

    def hook(event, args):
        nonlocal number
        here = event in CHANGES and any(str(arg).startswith(str(folder)) for arg in args[:2])
        if here and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)):
            number += 1
            act(number)

    sys.addaudithook(hook)


def number_of_changes(experiment, out):
    """How many changes of files an uninterrupted run makes."""
    seen = [0]

    def trained():
        at_each_change(out, seen.append)
        train(experiment, out)
        raise InputError(str(seen[-1]))  # which is one line

    _, said = child(trained)
    return int(said.removeprefix("error: "))


SIGNALS = (signal.SIGKILL, *stopping.StopRequest.SIGNALS)


def went_on(area, experiment, out, expected, what):
    """Type the same command again, and see that nothing is missing or different."""
    status, said = child(lambda: train(experiment, out))
    word = verdict(status, said)
    if word in ("intact", "refused"):
        found = result(make_run(experiment, out).folder)
        word = "intact" if found == expected else "lost" if found is None else "changed"
    count(area, word, f"{what}: {said[-300:]}")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_stopped_at_any_change_of_a_file_a_run_goes_on_to_the_same_end(experiment, whole, tmp_path):
    expected, _ = whole(experiment)
    changes = number_of_changes(experiment, tmp_path / "counted")
    area = f"kills and signals, {experiment}"
    others = SIGNALS[1:]  # one each, in turn
    cases = [
        (number, name)
        for number in range(1, changes + 1)
        for name in (signal.SIGKILL, others[number % len(others)])
    ]
    for case, (number, name) in enumerate(some(cases)):
        out = tmp_path / str(case)

        def before(out=out, number=number, name=name):
            at_each_change(out, lambda now: now == number and os.kill(os.getpid(), name))

        status, said = child(lambda out=out: train(experiment, out), before)
        word = verdict(status, said, (0, 75, 130))
        if word in ("hang", "traceback") or (word == "crash" and -status not in SIGNALS):
            count(area, word, f"{name.name} at change {number}: {said[-300:]}")
        else:
            went_on(area, experiment, out, expected, f"{name.name} at change {number}")


@pytest.mark.parametrize("experiment", ["resnet", "top-down"])
def test_on_a_disk_of_any_size_a_run_ends_in_one_line_and_goes_on(experiment, whole, tmp_path):
    """A limit on the size of files stands for a full disk."""
    expected, folder = whole(experiment)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    area = f"full disks, {experiment}"
    for size in some([int(largest * i / 60) for i in range(62)] + [1, 2, 100, 1000, 4095, 4096]):
        out = tmp_path / str(size)

        status, said = child(
            lambda out=out: train(experiment, out), lambda size=size: limit_files(size)
        )
        if (word := verdict(status, said)) in BAD:
            count(area, word, f"{size} bytes: {said[-300:]}")
        else:
            went_on(area, experiment, out, expected, f"{size} bytes")


# Readers


def equal(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)
    )


def state(network):
    serializer = chainer.serializers.DictionarySerializer()
    serializer.save(network)
    return [np.array(array) for _, array in sorted(serializer.target.items())]


def both(area, read, content, expected, **more):
    """Damage of what is sealed is noticed; with a right digest or none nothing crashes."""
    read_damaged(area, read, mutants(area, content, **more), lambda found: equal(found, expected))
    body = content[: content.rindex(files.SEAL)]
    made_up = f"{area} made up, with a right digest"
    crafted = [files.seal(each) for each in mutants(made_up, body, **more)]
    read_damaged(made_up, read, crafted, None)


def test_damaged_blocks(whole, tmp_path):
    _, folder = whole("resnet")
    path = tmp_path / "blocks.h5"

    def read(_, content):
        path.write_bytes(content)
        network, description = weights.restore(path)
        said = np.frombuffer(repr(description).encode(), np.uint8)
        return [*state(network), weights.read_mean(path), said]

    content = (folder / "blocks.h5").read_bytes()
    both("blocks.h5", read, content, read(0, content))


def test_damaged_snapshots(whole, tmp_path):
    _, folder = whole("resnet")
    path = tmp_path / "snapshot_iter_4.npz"
    trainer, snapshots = make_run("resnet", tmp_path).make_trainer()

    def read(_, content):
        path.write_bytes(content)
        trainer.updater.iteration = -1
        snapshots.resume(path, trainer)
        trainer._start_at, trainer._snapshot_elapsed_time = None, 0
        updater = trainer.updater
        velocities = [p.update_rule.state["v"].copy() for p in updater.optimizer.target.params()]
        log = np.frombuffer(repr(trainer.get_extension("LogReport").log).encode(), np.uint8)
        return [*state(updater.optimizer.target), *velocities, np.int64(updater.iteration), log]

    content = (folder / "snapshot_iter_4.npz").read_bytes()
    both("snapshots", read, content, read(0, content))


def batch(seed):
    rng = np.random.RandomState(seed)
    x = rng.randint(0, 256, (20, 3072)).astype(np.uint8)
    return {b"data": x, b"labels": [int(label) for label in rng.permutation(20) % 10]}


def damage_ends(rng, content, length=200):
    head, pixels, tail = content[:length], content[length:-length], content[-length:]
    if rng.random() < 0.5:
        return damage(rng, head) + pixels + tail
    return head + pixels + damage(rng, tail)


@pytest.mark.parametrize("protocol", [2, 5])
def test_damaged_pickles(protocol, tmp_path):
    for seed, name in enumerate(cifar10.OFFICIAL_MD5):
        (tmp_path / name).write_bytes(pickle.dumps(batch(seed), protocol=protocol))

    def read(_, content):
        (tmp_path / "data_batch_3").write_bytes(content)
        return cifar10.load(str(tmp_path)).train_x

    content = (tmp_path / "data_batch_3").read_bytes()
    area = f"pickles, protocol {protocol}"
    read_damaged(area, read, mutants(area, content), None)
    # Where the opcodes are, before and behind the pixels.
    read_damaged(
        f"{area}, opcodes", read, mutants(f"{area}, opcodes", content, change=damage_ends), None
    )


def test_damaged_array_caches(tmp_path):
    path, content = tmp_path / "cifar10.npz", io.BytesIO()
    names = ("train_x", "train_y", "test_x", "test_y")
    made = zip(names, synthetic.make(16, 8), strict=True)
    np.savez_compressed(content, **dict(made))

    def read(_, content):
        path.write_bytes(content)
        return cifar10.load(str(path)).train_x

    area = "Chainer's cache of CIFAR-10"
    read_damaged(area, read, mutants(area, content.getvalue()), None)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000"])
def test_damaged_images(kind, tmp_path):
    content, path = io.BytesIO(), tmp_path / "image"
    Image.fromarray(synthetic.make(1, 1)[0][0].transpose(1, 2, 0)).save(content, kind)

    def read(_, content):
        path.write_bytes(content)
        assert evaluate.read_image(path).shape == (3, 32, 32)

    read(0, content.getvalue())
    area = f"images, {kind}"
    read_damaged(area, read, mutants(area, content.getvalue(), 200), None)


@pytest.mark.parametrize("digest", [True, False], ids=["digest", "none"])
@pytest.mark.parametrize("name", ["log", "args.json"])
def test_damaged_logs_in_plots(name, digest, whole, tmp_path):
    _, folder = whole("resnet")
    (tmp_path / "log").write_bytes((folder / "log").read_bytes())
    arguments = json.loads((folder / "args.json").read_text())
    if not digest:  # as of a run that is not complete
        del arguments["sha256"]
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    content = (tmp_path / name).read_bytes()

    def read(_, content):
        (tmp_path / name).write_bytes(content)
        ((run,),) = (group.runs for group in logs.read([tmp_path]))
        return run.entries, run.identity

    area, expected = f"{name} in plots{'' if digest else ', no digest'}", read(0, content)
    damaged = mutants(area, content, change=damage_json)
    read_damaged(area, read, damaged, (lambda found: found == expected) if digest else None)


@pytest.mark.parametrize("name", ["log", "args.json"])
def test_a_damaged_log_beside_whole_blocks(name, whole, tmp_path):
    """The log is made again where its digest differs, or args.json is refused."""
    _, folder = whole("resnet")
    area = f"{name} of a complete run"
    own = tmp_path / folder.name
    subprocess.run(["cp", "-r", folder, own], check=True)
    run = make_run("resnet", tmp_path)

    def read(_, content):
        (own / name).write_bytes(content)
        run.train()
        return (own / "log").read_bytes()

    content, log = (folder / name).read_bytes(), (folder / "log").read_bytes()
    damaged = mutants(area, content, 300, damage_json)
    read_damaged(area, read, damaged, lambda found: found == log)


# Flags

COMMANDS = {
    "experiments/resnet.py": ["--n", "1", "-b", "8", "--epoch", "1", "--data", "synthetic"],
    "experiments/partial_training.py": ["--order", "top-down", "--data", "synthetic", "-b", "8"],
    "experiments/evidence.py": ["--list"],
    "experiments/speed.py": [],
    "resnet.evaluate": ["BLOCKS", "--data", "synthetic"],
    "resnet.cifar10": ["synthetic"],
    "plots/curves.py": ["RUNS"],
    "plots/tables.py": ["RUNS"],
    "plots/figures.py": ["RUNS"],
    "plots/report.py": ["RUNS"],
    "plots/claims.py": ["RUNS"],
    "plots/collect.py": ["--check", "--measured", "FOLDER"],
    "resnet.export": ["BLOCKS", "--data", "synthetic", "--h5", "blocks.h5"],
    "resnet.pretrained": ["nowhere"],
}
HOSTILE = (
    "", "--", "-", "-1", "0", "1", "9" * 30, "9" * 5000, "1e308", "-1e308", "nan", "inf", "1e-320",
    "0x10", "1_0", " 3 ", "\u00b2", "\u0663", "a\nb", "\r", "\x1b[2J", "\udcff", "\u00e9",
    "x" * 300, "x" * 5000, "~", "~nosuchuser", "/dev/zero", "/dev/null", "/dev/full", "PIPE",
    "FOLDER", "nowhere", "/proc/self/mem", "%s%n", "$(touch code)", "`touch code`", "None", "[]",
    "@cupy:0", "4294967295", "4294967296", "9223372036854775808", "cpu", "synthetic", "-h",
)  # fmt: skip


def run_command(name, words):
    """Run a script or module as the shell would, without training or measuring anything."""

    def nothing(*_):
        return None

    def started(*_, **__):
        raise InputError("nothing is started here")

    training.Run.train = PartialTraining.train = training.print_summary = nothing
    synthetic.make = functools.partial(synthetic.make, 20, 10)
    subprocess.Popen = started
    sys.argv = [name, *words]
    if name.endswith(".py"):
        sys.path.insert(0, str(ROOT / Path(name).parent))
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__")


@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_values_of_flags(name, whole, tmp_path, monkeypatch):
    _, runs = whole("resnet")
    monkeypatch.chdir(tmp_path)
    os.mkfifo("PIPE")
    Path("FOLDER").mkdir()
    places = {"RUNS": str(runs), "BLOCKS": str(runs)}
    words = [places.get(word, word) for word in COMMANDS[name]]
    shown = subprocess.run(
        [sys.executable, *([name] if name.endswith(".py") else ["-m", name]), "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.findall(r"^  (?:-\w,? )?(?:\S+, )?(--[\w-]+)", shown, re.MULTILINE)
    cases = [[*words, flag, value] for flag in found for value in HOSTILE]
    cases += [[*words, f"{flag}={value}"] for flag in found for value in HOSTILE]
    cases += [[value, *words[1:]] for value in HOSTILE]
    for case in some(cases):
        status, said = child(functools.partial(run_command, name, case))
        word = verdict(status, said, (0, 1, 2))
        count(
            f"flags, {name}",
            "code" if Path("code").exists() else word,
            f"{name} {case}: {said[-300:]}",
        )
