"""The speed table: what it counts, and that it measures what it says."""

import io
import json
import sys
from types import SimpleNamespace

import chainer
import emulation
import numpy as np
import pytest
from conftest import python

from experiments import speed
from resnet import command, flags, functions


@pytest.mark.parametrize("n, macs", [(3, 40.55), (5, 68.86), (7, 97.17), (9, 125.49), (18, 252.89)])
def test_operations_are_three_products_per_weight_but_for_the_first_inputs(n, macs):
    """Multiply-accumulates of a forward pass, in millions, are known for the five depths."""
    stem = 32 * 32 * 9 * 3 * 16
    assert speed.flop(n) == pytest.approx(2 * (3 * macs * 1e6 - stem), rel=1e-3)


def test_winograd_needs_36_products_of_144_and_81_where_the_stride_is_two():
    convolutions = [(32, 16, 16)] * 6 + [(16, 32, 32)] * 5 + [(8, 64, 64)] * 5
    strided = [(16, 16, 32), (8, 32, 64)]
    products = sum(
        side**2 * 9 * c * k * (36 if c == k else 81) / 144 for side, c, k in convolutions + strided
    )
    stem, fc = 32 * 32 * 9 * 3 * 16, 64 * 10
    assert speed.flop(3, *speed.FLOORS["floor winograd"]) == 2 * (3 * (products + fc) + 2 * stem)


@pytest.mark.parametrize("most", [100, 15])
def test_the_floor_does_as_many_operations_as_it_says(monkeypatch, most):
    """In a product of matrices of ones each element is the number of products in it."""
    monkeypatch.setattr(speed, "COLUMNS", most)
    count = 2 * speed.SIDE**2 * 30
    pieces, product = speed.products(count)()
    assert pieces == -(-30 // most) and 2 * pieces * float(product.sum()) == count


def one(variant, ms, processor=None, **others):
    """The result of a variant."""
    found = {"layers": 20, "batchsize": 128, "variant": variant, "backend": "onednn (2)"}
    found |= {"precision": speed.parts(variant)[1], "images/s": 128e3 / ms, "peak MiB": 900.0}
    for name, middle in (("ms", ms), ("processor ms", processor or 2 * ms)):
        found |= {name: middle, f"{name} 10 %": 0.9 * middle, f"{name} 90 %": 1.1 * middle}
    return found | others


def cells(results):
    """The rows of the table by variant."""
    lines = [line.strip("| ").split(" | ") for line in speed.table(results).splitlines()]
    rows = {r["variant"]: row for r, row in zip(results, lines[2:], strict=True)}
    return {name: dict(zip(lines[0], row, strict=False)) for name, row in rows.items()}


def test_each_is_compared_with_the_best_float32_and_the_best_of_any_precision():
    rows = cells([one("ours", 100.0, 150.0), one("torch", 300.0), one("torch channels_last", 200.0),
                  one("torch channels_last bf16", 150.0), one("floor", 50.0),
                  one("torch", 1.0, layers=56), one("torch", 1.0, batchsize=64),
                  one("torch compile", 1.0, error="no compiler")])  # fmt: skip
    full, any_precision = "Best float32 PyTorch = 1", "Best PyTorch = 1"
    assert rows["ours"][full] == "2.00 (2.67)" and rows["ours"][any_precision] == "1.50 (2.00)"
    half = rows["torch channels_last bf16"]
    assert half["Precision"] == "bfloat16" and rows["ours"]["Precision"] == "float32"
    assert half[full] == "1.33 (1.33)" and half[any_precision] == "1.00 (1.00)"
    assert rows["ours"]["Floor = 1"] == "0.50 (0.67)"
    assert "not run: no compiler" in rows["torch compile"].values()


def test_times_are_given_with_their_spread():
    row = cells([one("ours", 10.0, 20.0)])["ours"]
    assert row["ms per step (10 % .. 90 %)"] == "10.0 (9.0 .. 11.0)"
    assert row["Processor ms (10 % .. 90 %)"] == "20.0 (18.0 .. 22.0)"
    assert row["Best PyTorch = 1"] == row["Floor = 1"] == speed.BLANK


def change(monkeypatch, start, variant):
    """How two steps of a variant change the weights of the network ``start``."""
    torch_network = pytest.importorskip("experiments.torch_network")
    network, twins, computed_in = start.copy("copy"), [], set()

    class Twin(torch_network.TorchNetwork):
        def __init__(self, *words):
            super().__init__(*words)
            twins.append(self.load(network))
            for convolution in filter(lambda m: hasattr(m, "kernel_size"), self.modules()):
                convolution.register_forward_hook(lambda link, x, y: computed_in.add(str(y.dtype)))

    monkeypatch.setattr(speed, "resnet", lambda n: network)
    monkeypatch.setattr(torch_network, "TorchNetwork", Twin)
    step = speed.step_of(variant, network.n, 8, chainer.get_device("@numpy"))
    step.run()
    step.run()
    after = {torch_network.torch_name(name): p.array for name, p in network.namedparams()}
    for twin in twins:
        after = {name: p.detach().numpy() for name, p in twin.named_parameters()}
        assert computed_in == {f"torch.{speed.parts(variant)[1]}"}
        assert all(weights.dtype == np.float32 for weights in after.values())
    return np.concatenate(
        [
            (after[torch_network.torch_name(name)] - p.array).ravel()
            for name, p in start.namedparams()
        ]
    )


@pytest.mark.parametrize(
    ("variant", "tolerance"),
    [("ours", 0.003), ("torch", 0.003), ("torch channels_last", 0.003),
     ("torch channels_last fp16", 0.03), ("torch channels_last bf16", 0.1)],
)  # fmt: skip
def test_all_do_the_same_training_step(monkeypatch, variant, tolerance):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(speed, "RATE", 0.01)
    monkeypatch.setattr(speed.training, "WEIGHT_DECAY", 0.1)  # large enough to be seen
    start = speed.resnet(1)
    expected = change(monkeypatch, start, "chainer")
    found = change(monkeypatch, start, variant)
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


class Gpu(chainer.backend.CpuDevice):
    """A stand-in for a GPU, whose arrays are NumPy's; see emulation.py."""

    xp = None


@pytest.fixture
def gpu(monkeypatch):
    """The emulated CUDA backend on a stand-in for a GPU; its ``stream`` can refuse to record."""
    if emulation.COMPILER is None:
        pytest.skip("g++ is missing: it compiles the CUDA kernels for the CPU")
    module, _, memory = emulation.install(monkeypatch, "fp32")
    memory.cuda.runtime = SimpleNamespace(deviceSynchronize=lambda: None)
    memory.cuda.MemoryPool().total_bytes = lambda: 2 << 20
    memory.get_default_memory_pool = lambda: SimpleNamespace(total_bytes=lambda: 3 << 20)
    monkeypatch.setattr(Gpu, "xp", memory)
    monkeypatch.setattr(functions, "use", lambda *words: "cuda (emulated)")
    monkeypatch.setattr(speed, "TOGETHER", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    return SimpleNamespace(device=Gpu(), stream=module.stream)


def answers(device):
    out = io.StringIO()
    speed.work("ours fp32", 1, 2, device, out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_memory_on_a_gpu_is_what_the_pools_have_taken(gpu):
    ready, measured = answers(gpu.device)
    assert ready == {"backend": "cuda (emulated)"}
    assert measured["peak"] == 5 and measured["together"] == 2
    [(wall, processor)] = measured["times"]
    assert wall > 0 and processor > 0


def test_a_step_that_could_not_be_recorded_is_not_measured(gpu, capsys):
    gpu.stream.refuses = "end_capture"
    [answer] = answers(gpu.device)
    assert "no CUDA graph" in answer["error"]
    stderr = capsys.readouterr().err
    assert "CUDA refuses end_capture" in stderr and "Traceback" in stderr


@pytest.mark.parametrize(("mode", "most"), [(0, len(speed.ON_GPU)), (3, 1)])
def test_a_gpu_for_one_process_has_one_at_a_time(monkeypatch, capsys, mode, most):
    alive, counts = set(), []

    class Worker:
        error, backend, together, peak = None, "stand-in", 1, 1.0

        def __init__(self, variant, n, batchsize, device):
            self.variant, self.times = variant, []
            alive.add(self)

        def measure(self, count):
            counts.append(len(alive))
            self.times.append([0.1, 0.1])
            return 0.1

        def stop(self):
            alive.remove(self)

    runtime = SimpleNamespace(
        deviceGetAttribute=lambda attribute, device: {20: mode}[attribute],
        getDeviceProperties=lambda device: {"name": b"stand-in"},
    )
    xp = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    device = SimpleNamespace(xp=xp, device=SimpleNamespace(id=0))
    monkeypatch.setattr(speed, "Worker", Worker)
    monkeypatch.setattr(flags, "find_device", lambda name: device)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "0", "--rounds", "1"])
    speed.main()
    assert max(counts) == most and not alive
    assert capsys.readouterr().out.count("100.0 (100.0 .. 100.0)") == 2 * len(speed.ON_GPU)


def test_a_process_that_died_is_an_error_and_no_end():
    worker = speed.Worker("floor", 1, 1, "cpu")
    assert worker.measure(1) > 0
    worker.process.kill()
    assert worker.measure(1) == worker.measure(1) == 0
    worker.stop()
    assert worker.error == "its process ended with status -9"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--only", "ours tf32"), "--only: found 'ours tf32', legal with --device cpu: ours, "),
        (("--device", "gpu"), "--device: found 'gpu', legal: cpu"),
        (("-o", "no/such/folder/speed"), "--out: found 'no/such/folder/speed', legal: a name in"),
    ],
)
def test_what_the_device_cannot_run_is_one_line(words, line):
    done = python("experiments/speed.py", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert line in done.stderr and done.stderr.count("\n") == 1


def test_a_measurement_from_the_command_line(tmp_path):
    words = ("--n", "1", "-b", "4", "--rounds", "2", "--turn", "0", "-o", tmp_path / "speed")
    variants = ["ours", "chainer", "torch", "floor"]
    done = python("experiments/speed.py", *words, "--only", *variants)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "speed.json").read_text())
    assert [r["variant"] for r in measured["results"]] == variants
    for r in measured["results"]:
        if "error" not in r:
            assert r["steps"] == 2 and 0 < r["ms 10 %"] <= r["ms"] <= r["ms 90 %"]
            assert 0 < r["processor ms"] < 1.1 * measured["threads"] * r["ms 90 %"]
            assert r["images/s"] == pytest.approx(4000 / r["ms"]) and r["peak MiB"] > 50
    assert (tmp_path / "speed.md").read_text().strip() == done.stdout.strip()


def test_ours_that_fails_is_reported_in_full_and_ends_with_1(tmp_path, monkeypatch, capfd):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('what went wrong')")
    monkeypatch.setattr(speed, "__file__", str(script))
    words = ["--only", "torch", "ours", "--rounds", "1", "-o", str(tmp_path / "speed")]
    monkeypatch.setattr(sys, "argv", ["speed.py", *words])
    with pytest.raises(command.InputError, match=r"^not run: ours \(its process ended") as error:
        speed.main()
    assert error.value.code == 1 and capfd.readouterr().err.count("what went wrong") == 2
    assert "not run: its process ended with status 1" in (tmp_path / "speed.md").read_text()
