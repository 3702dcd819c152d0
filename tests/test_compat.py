"""The shims: what they mend, and that they keep off what works. Each test is a fresh process."""

import re
import sys

import pytest
from conftest import ROOT, python

from resnet import compat

# Run before everything else: the packages that newer Pythons and setuptools no longer have.
WITHOUT = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name in ("numpy.distutils", "pkg_resources"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
"""
# The same packages as stand-ins that are there.
WITH = """
import sys, types
import numpy
numpy.distutils = types.ModuleType("numpy.distutils")
numpy.distutils.system_info = types.ModuleType("numpy.distutils.system_info")
packages = types.ModuleType("pkg_resources")
class DistributionNotFound(Exception):
    pass
def require(requirement):
    raise DistributionNotFound(requirement)
packages.require, packages.DistributionNotFound = require, DistributionNotFound
for module in (numpy.distutils, numpy.distutils.system_info, packages):
    sys.modules[module.__name__] = module
"""
# pkg_resources alone, as setuptools 80.9 has it.
DEPRECATED = """
import sys, types, warnings
class Warns:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy.distutils":
            raise ModuleNotFoundError(name)
        if name == "pkg_resources":
            from importlib.machinery import ModuleSpec
            return ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        warnings.warn("pkg_resources is deprecated as an API. See https", UserWarning, 2)
        module.DistributionNotFound, module.require = LookupError, lambda requirement: None
sys.meta_path.insert(0, Warns())
"""
# Processes as Python 3.14 starts them on Linux when nobody has chosen a method.
FORKSERVER = """
import multiprocessing
from multiprocessing import context
multiprocessing.get_all_start_methods = lambda: ["forkserver", "spawn", "fork"]
context._default_context._default_context = context._concrete_contexts["forkserver"]
"""
both = pytest.mark.parametrize("world", ["", WITHOUT], ids=["as it is", "without"])


def run(code, cwd=ROOT, flags=()):
    """Run ``code`` and return what it printed; it must end well and write nothing to stderr."""
    done = python(*flags, "-c", code, cwd=cwd, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    "world", ["", WITHOUT, DEPRECATED], ids=["as it is", "without", "deprecated"]
)
def test_chainer_imports_quietly(world):
    code = "import resnet, chainer, chainer.testing; print(chainer.__version__)"
    assert run(world + code) == "7.8.1\n"


def test_nothing_deprecated_is_used_where_the_shims_stand_in():
    run(WITHOUT + "import resnet, chainer", flags=["-W", "error::DeprecationWarning"])


def test_without_the_shims_chainer_does_not_import():
    """When this fails the shims have become needless."""
    done = python("-c", WITHOUT + "import chainer")
    assert done.returncode == 1


def test_names_that_numpy_has_are_left_alone():
    run(
        "import numpy as np\n"
        "np.sctypes, np.float, np.NaN = names = {'int': [np.int64]}, object(), object()\n"
        "bool = np.bool if 'bool' in vars(np) else None\n"
        "from resnet import compat\n"
        "assert (np.sctypes, np.float, np.NaN) == names and bool in (None, np.bool)"
    )


def test_names_that_numpy_lacks_are_added():
    run(
        "import numpy as np\n"
        "for name in ('sctypes', 'float'):\n"
        "    vars(np).pop(name, None)\n"
        "from resnet import compat\n"
        "assert np.float is float and np.float64 in np.sctypes['float']\n"
        "assert {t().itemsize for t in np.sctypes['int']} == {1, 2, 4, 8}"
    )


def test_names_of_old_scripts_mean_what_they_meant():
    run(
        "import resnet.compat\n"
        "import numpy as np\n"
        "def kind(name, values=(1,)):\n"
        "    return np.array(values, getattr(np, name)).dtype.str[1:]\n"
        "assert [kind(n) for n in ('int', 'float', 'complex')] == ['i8', 'f8', 'c16']\n"
        "assert [kind(n) for n in ('bool', 'object')] == ['b1', 'O'] and kind('long')[0] == 'i'\n"
        "assert [kind(n, 'a') for n in ('str', 'unicode', 'unicode_')] == ['U1'] * 3\n"
        "assert [kind('string_', 'a'), kind('float_'), kind('complex_')] == ['S1', 'f8', 'c16']\n"
        "assert isinstance(1.5, np.float) and isinstance('a', np.str) and isinstance(1, np.int)\n"
        "assert np.Inf == np.Infinity == np.infty == np.PINF == -np.NINF == float('inf')\n"
        "assert np.NaN != np.NaN and np.asscalar(np.float32([[2.5]])) == 2.5\n"
        "assert np.product([2, 3]) == 6 and list(np.cumproduct([2, 3])) == [2, 6]\n"
        "assert np.sometrue([0, 1]) and not np.alltrue([0, 1]) and np.round_(2.25, 1) == 2.2\n"
        "assert (np.mat([[1, 2], [3, 4]]) * np.mat('1; 1')).tolist() == [[3], [7]]\n"
        "assert np.in1d([[1, 2], [3, 4]], [2, 4]).tolist() == [False, True, False, True]\n"
        "assert np.in1d(5, [1], invert=True).tolist() == [True] and np.trapz([1, 3], dx=2) == 4\n"
        "assert np.asfarray(['1', '2.5']).tolist() == [1, 2.5] and np.asfarray(1).dtype == 'f8'\n"
        "assert np.asfarray([1], np.float32).dtype == 'f4'\n"
        "assert issubclass(np.VisibleDeprecationWarning, UserWarning)"
    )


def test_names_that_python_and_pillow_have_removed_are_added():
    run(
        "import resnet.compat\n"
        "import collections, time\n"
        "from PIL import Image\n"
        "assert isinstance([], collections.Sequence) and isinstance({}, collections.Mapping)\n"
        "assert not isinstance(1, collections.Iterable) and collections.Counter('a')['a'] == 1\n"
        "before = time.clock()\n"
        "assert time.process_time() >= before > 0\n"
        "assert Image.new('RGB', (4, 4)).resize((2, 2), Image.ANTIALIAS).size == (2, 2)"
    )


def test_fromstring_reads_bytes_into_an_array_of_its_own():
    run(
        "import resnet.compat\n"
        "import numpy as np\n"
        "read = np.fromstring(b'\\1\\0\\2\\0', np.int16)\n"
        "read += 1\n"
        "assert read.tolist() == [2, 3]\n"
        "assert np.fromstring(b'\\3\\4', dtype=np.uint8, count=1).tolist() == [3]\n"
        "assert np.fromstring('1,2.5', sep=',').tolist() == [1, 2.5]\n"
        "again = np.fromstring\n"
        "resnet.compat.apply()\n"
        "assert np.fromstring is again",
        flags=["-W", "ignore::DeprecationWarning"],  # of NumPy before 2.3
    )


def test_the_page_says_which_names_of_numpy_are_covered_and_no_others():
    text = (ROOT / "resnet" / "README.md").read_text()
    _, _, text = text.partition("names that NumPy dropped")
    text, _, _ = text.partition("\n\n")
    assert sorted(re.findall(r"`np\.(\w+)`", text)) == sorted(compat.NUMPY_NAMES)


def test_chainers_own_environment_check_and_a_real_pkg_resources_are_left_alone():
    run(
        WITH + "import resnet.compat\n"
        "assert 'chainer._environment_check' not in sys.modules\n"
        "assert sys.modules['pkg_resources'] is packages\n"
        "import chainer\n"
        "assert chainer._environment_check.__file__.endswith('_environment_check.py')"
    )


def test_environment_check_and_pkg_resources_get_stand_ins_where_they_cannot_work():
    run(
        WITHOUT + "import resnet.compat\n"
        "import chainer, pkg_resources\n"
        "assert chainer._environment_check.check() is None\n"
        "assert not hasattr(chainer._environment_check, '__file__')\n"
        "pkg_resources.WorkingSet().require('chainer>=7', 'numpy')\n"
        "for wanted in ('chainer<7', 'surely-not-installed'):\n"
        "    try:\n"
        "        pkg_resources.require(wanted)\n"
        "    except pkg_resources.ResolutionError:\n"
        "        continue\n"
        "    raise SystemExit(wanted)"
    )


OTHERS = "import resnet.compat"
OURS = "import resnet.functions"


@pytest.mark.parametrize(("imports", "lines"), [(OTHERS, 1), (OURS, 0)], ids=["others", "ours"])
def test_a_cupy_without_cudnn_is_said_once_to_other_scripts_and_ours_say_it_themselves(
    imports, lines
):
    printed = run(
        f"import warnings\n{imports}\n"
        "from chainer.backends import cuda\n"
        "cuda.available, cuda.cudnn_enabled = True, False\n"
        "cuda._cudnn_disabled_by_user = False\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    cuda.check_cuda_available()\n"
        "    cuda.check_cuda_available()\n"
        "print(*(each.message for each in caught), sep='\\n')"
    )
    assert "reinstall" not in printed and printed.count("CuPy has no cuDNN here") == lines


@pytest.mark.parametrize(
    ("message", "category"),
    [
        ("\nnccl library could not be loaded.\n\nReason: ImportError", "UserWarning"),
        ("`ndarray.scatter_add` is deprecated. Please use `cupy.add.at`", "DeprecationWarning"),
    ],
    ids=["nccl", "scatter_add"],
)
def test_what_cupy_warns_of_in_vain_is_not_shown(message, category):
    run(
        "import warnings\n"
        "warnings.simplefilter('default')\n"
        "import resnet.compat\n"
        f"warnings.warn({message!r}, {category})"
    )


def test_applying_twice_changes_nothing():
    run(
        "import sys\n"
        "from resnet import compat\n"
        "import chainer, numpy\n"
        "before = len(sys.meta_path), numpy.sctypes, sys.modules['chainer._environment_check']\n"
        "compat.apply()\n"
        "after = len(sys.meta_path), numpy.sctypes, sys.modules['chainer._environment_check']\n"
        "assert before == after"
    )


@both
def test_gradient_check_finds_right_and_wrong_gradients(world):
    run(
        world + "import resnet.compat\n"
        "import chainer, chainer.functions as F, numpy as np\n"
        "from chainer import gradient_check\n"
        "x = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)\n"
        "def check(f):\n"
        "    gradient_check.check_backward(f, x, np.ones_like(x), dtype=np.float64)\n"
        "check(F.sigmoid)\n"
        "try:\n"
        "    check(lambda x: F.sigmoid(x) + x.array)\n"
        "except AssertionError:\n"
        "    pass\n"
        "else:\n"
        "    raise SystemExit('the wrong gradient passed')"
    )


def test_resize_images():
    run(
        "import resnet.compat\n"
        "import chainer.functions as F, numpy as np\n"
        "x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)\n"
        "y = F.resize_images(x, (3, 3)).array[0, 0]\n"
        "assert (y == [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]).all(), y"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Chainer never had fork")
@pytest.mark.parametrize("world", ["", FORKSERVER], ids=["as it is", "forkserver"])
def test_worker_processes_take_a_dataset_that_holds_a_lambda(world):
    printed = run(
        world + "import resnet.compat\n"
        "import chainer, numpy as np\n"
        "print('once')\n"
        "data = chainer.datasets.TransformDataset(np.arange(6), lambda x: x * x)\n"
        "for again in range(2):\n"
        "    batches = chainer.iterators.MultiprocessIterator(\n"
        "        data, 2, n_processes=2, repeat=False, shuffle=False)\n"
        "    assert [*map(list, batches)] == [[0, 1], [4, 9], [16, 25]]\n"
        "    batches.finalize()",
        flags=["-W", "ignore"],  # of fork beside threads
    )
    assert printed == "once\n"


def test_a_start_method_that_the_script_has_chosen_is_kept(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import resnet.compat\n"
        "import chainer, multiprocessing, numpy as np\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('forkserver')\n"
        "    batches = chainer.iterators.MultiprocessIterator(np.arange(6), 2, n_processes=1)\n"
        "    next(batches)\n"
        "    print(batches._prefetch_loop._pool._ctx.get_start_method())\n"
        "    batches.finalize()\n"
    )
    done = python(script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (0, "forkserver\n"), done.stderr


def test_a_categorical_distribution_knows_the_probability_of_what_it_drew():
    run(
        "import resnet.compat\n"
        "import chainer, numpy as np\n"
        "p = np.float32([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])\n"
        "distribution = chainer.distributions.Categorical(p=p)\n"
        "drawn = distribution.sample(7)\n"
        "expected = p[[0, 1], drawn.array]\n"
        "for x in (drawn, drawn.array):\n"
        "    found = np.exp(distribution.log_prob(x).array)\n"
        "    assert found.shape == (7, 2) and np.allclose(found, expected), found\n"
        "one = chainer.distributions.Categorical(p=p[0])\n"
        "assert np.allclose(np.exp(one.log_prob(np.array(1)).array), 0.25)"
    )


def test_strings_numbers_and_arrays_are_read_from_hdf5(tmp_path):
    run(
        "import resnet.compat\n"
        "import chainer, h5py, numpy as np\n"
        "with h5py.File('file.h5', 'w') as file:\n"
        "    file['a'], file['b'], file['c'], file['d'] = 'abc', 'Größe', 7, np.arange(3.0)\n"
        "link = chainer.Link()\n"
        "for name, value in zip('abcd', ('', '', 0, np.zeros(3))):\n"
        "    link.add_persistent(name, value)\n"
        "chainer.serializers.load_hdf5('file.h5', link)\n"
        "assert (link.a, link.b, link.c) == ('abc', 'Größe', 7), (link.a, link.b, link.c)\n"
        "assert (link.d == [0, 1, 2]).all()",
        cwd=tmp_path,
    )


def test_a_caffe_model_is_written_and_read(tmp_path):
    run(
        "import resnet.compat\n"
        "import chainer, chainer.functions as F, chainer.links as L, numpy as np\n"
        "from chainer.exporters import caffe\n"
        "from chainer.links.caffe import CaffeFunction\n"
        "class Net(chainer.Chain):\n"
        "    def __init__(self):\n"
        "        super().__init__(conv=L.Convolution2D(3, 4, 3), fc=L.Linear(64, 5))\n"
        "    def __call__(self, x):\n"
        "        return F.softmax(self.fc(F.relu(self.conv(x))))\n"
        "net, x = Net(), np.random.rand(2, 3, 6, 6).astype(np.float32)\n"
        "with chainer.using_config('train', False):\n"
        "    caffe.export(net, [chainer.Variable(x)], '.', True)\n"
        "function = CaffeFunction('chainer_model.caffemodel')\n"
        "last = function.layers[-1][2][0]\n"
        "y, = function(inputs={'data': x}, outputs=[last])\n"
        "assert np.allclose(y.array, net(x).array, atol=1e-6)",
        cwd=tmp_path,
    )


OLD_SCRIPT = """
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import training
from chainer.training import extensions


class MLP(chainer.Chain):
    def __init__(self):
        super(MLP, self).__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, 20)
            self.l2 = L.Linear(None, 3)

    def __call__(self, x):
        return self.l2(F.relu(self.l1(x)))


np.random.seed(0)
x = np.random.randn(90, 5).astype(np.float32)
y = x[:, :3].argmax(axis=1).astype(np.int32)
data = chainer.datasets.TupleDataset(x, y)
model = L.Classifier(MLP())
optimizer = chainer.optimizers.Adam(alpha=0.01)
optimizer.setup(model)
train = chainer.iterators.SerialIterator(data, 10)
test = chainer.iterators.SerialIterator(data, 10, repeat=False, shuffle=False)
updater = training.updaters.StandardUpdater(train, optimizer)
trainer = training.Trainer(updater, (10, 'epoch'), out='result')
trainer.extend(extensions.Evaluator(test, model))
trainer.extend(extensions.LogReport())
trainer.extend(extensions.PrintReport(['epoch', 'main/loss', 'validation/main/accuracy']))
trainer.extend(extensions.snapshot())
trainer.run()
chainer.serializers.load_npz('result/snapshot_iter_90', trainer)
print(trainer.observation['validation/main/accuracy'] > 0.9)
"""


@both
def test_an_old_script_runs_with_one_more_line(world, tmp_path):
    output = run(world + "import resnet.compat\n" + OLD_SCRIPT, cwd=tmp_path)
    assert output.split("\n")[-2] == "True"
    assert {"log", "snapshot_iter_90"} <= {file.name for file in (tmp_path / "result").iterdir()}


@both
@pytest.mark.parametrize("name", ["train.py", "folder/train.py"])
def test_an_old_script_runs_as_it_is_beside_a_module_of_our_name(world, name, tmp_path):
    """The script's folder, arguments and name are as ``python train.py`` has them."""
    script = tmp_path / name
    script.parent.mkdir(exist_ok=True)
    (script.parent / "resnet.py").write_text("DEPTH = 50\n")
    script.write_text(
        "import sys\nimport chainer, resnet\n"
        "assert __name__ == '__main__' and __file__ == sys.argv[0]\n"
        "print(resnet.DEPTH, sys.argv[1:], chainer.__version__)\n"
    )
    code = world + "from resnet import compat; compat.main()"
    done = python("-P", "-c", code, name, "--gpu", "-1", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "50 ['--gpu', '-1'] 7.8.1\n"


@pytest.mark.parametrize("module", ["resnet.compat", "resnet compat"])
def test_an_old_script_runs_from_the_command_line(module, tmp_path):
    (tmp_path / "old.py").write_text(OLD_SCRIPT)
    done = python("-m", *module.split(), "old.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[-2] == "True"


def test_a_script_that_is_not_there_is_named_in_one_line(tmp_path):
    done = python("-m", "resnet.compat", "old.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert done.stderr == "error: old.py: no such file; legal: a Python script\n"
    done = python("-m", "resnet.compat", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
