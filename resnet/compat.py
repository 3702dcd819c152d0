"""Let Chainer 7.8.1 run on today's Python, NumPy, h5py, protobuf and setuptools.

Import this module before ``chainer``, ``chainermn`` or ``onnx_chainer``; ``import resnet`` does.
Old Chainer scripts need one more line at their top, or run as they are under this module::

    import resnet.compat
    python -m resnet.compat train_mnist.py --epoch 2

Each shim says what breaks without it and is applied only where it does break: a Chainer on an
older stack, or one that has been mended, is left as it is. CuPy 13 and 14 need none to work, but
advice and warnings that are wrong today are silenced.
"""

from __future__ import annotations

import collections.abc
import importlib.metadata
import importlib.util
import multiprocessing
import os
import runpy
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder

import numpy as np

# What scripts of Chainer's time call by names that NumPy has removed, most in 1.24 and 2.0.
NUMPY_NAMES = {
    "bool": bool,
    "complex": complex,
    "float": float,  # F.resize_images uses it, too
    "int": int,
    "long": int,
    "object": object,
    "str": str,
    "unicode": str,
    "complex_": np.complex128,
    "float_": np.float64,
    "string_": np.bytes_,
    "unicode_": np.str_,
    "Inf": np.inf,
    "Infinity": np.inf,
    "NINF": -np.inf,
    "NaN": np.nan,
    "PINF": np.inf,
    "infty": np.inf,
    "alltrue": np.all,
    "asfarray": lambda a, dtype=float: np.asarray(a, dtype),
    "asscalar": lambda array: array.item(),
    "cumproduct": np.cumprod,
    "in1d": lambda a, *args, **kwargs: np.isin(np.ravel(a), *args, **kwargs),
    "mat": np.asmatrix,
    "product": np.prod,
    "round_": np.round,
    "sometrue": np.any,
    "trapz": getattr(np, "trapezoid", None),  # before NumPy 2.0 there is the old name alone
    "VisibleDeprecationWarning": np.exceptions.VisibleDeprecationWarning,
}


def _numpy_names() -> None:
    # NumPy 2.0 removed np.sctypes, which functions/array/as_strided.py reads when imported.
    if not hasattr(np, "sctypes"):
        np.sctypes = {
            "int": [np.int8, np.int16, np.int32, np.int64],
            "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
            "float": [np.float16, np.float32, np.float64, np.longdouble],
            "complex": [np.complex64, np.complex128, np.clongdouble],
            "others": [bool, object, bytes, str, np.void],
        }
    for name, value in NUMPY_NAMES.items():
        vars(np).setdefault(name, value)


def _numpy_fromstring() -> None:
    # NumPy 2.3 refuses np.fromstring of bytes, with which scripts read sound and images.
    fromstring = np.fromstring
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            fromstring(b"\0", np.uint8)
    except ValueError:

        def of_bytes_too(string, dtype=float, count=-1, *, sep="", **kwargs):
            if sep == "" and not isinstance(string, str):
                return np.frombuffer(string, dtype, count, **kwargs).copy()
            return fromstring(string, dtype, count, sep=sep, **kwargs)

        np.fromstring = of_bytes_too


def _python_names() -> None:
    # Python removed time.clock in 3.8 and the abstract classes of collections in 3.10.
    vars(time).setdefault("clock", time.process_time)
    for name in collections.abc.__all__:
        vars(collections).setdefault(name, getattr(collections.abc, name))


def _found(name: str) -> bool:
    """Tell whether the module ``name`` is loaded or can be imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent package is missing
        return False


def _stub(name: str, **members: object) -> types.ModuleType:
    module = types.ModuleType(name, "Stand-in made by resnet.compat.")
    vars(module).update(members)
    sys.modules[name] = module
    return module


def _environment_check() -> None:
    # chainer/_environment_check.py imports numpy.distutils (gone in Python 3.12) and
    # pkg_resources (gone in setuptools 82) to print advice about macOS and old CuPy versions.
    if "chainer" in sys.modules:
        return
    if not all(map(_found, ("numpy.distutils", "pkg_resources"))):
        _stub("chainer._environment_check", check=lambda: None)


def _pkg_resources() -> None:
    # chainer.testing, and through it chainer.gradient_check, asks pkg_resources whether optional
    # packages are installed. From setuptools 80.9 on it warns everybody that it will go.
    if _found("pkg_resources"):
        warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
        return

    class ResolutionError(Exception):
        pass

    class DistributionNotFound(ResolutionError):
        pass

    class VersionConflict(ResolutionError):
        pass

    class WorkingSet:
        def require(self, *requirements: str) -> None:
            from packaging.requirements import Requirement

            for requirement in map(Requirement, requirements):
                try:
                    version = importlib.metadata.version(requirement.name)
                except importlib.metadata.PackageNotFoundError:
                    raise DistributionNotFound(str(requirement)) from None
                if not requirement.specifier.contains(version, prereleases=True):
                    raise VersionConflict(f"{requirement}, found {version}")

    _stub(
        "pkg_resources",
        ResolutionError=ResolutionError,
        DistributionNotFound=DistributionNotFound,
        VersionConflict=VersionConflict,
        WorkingSet=WorkingSet,
        require=WorkingSet().require,
    )


def _thread_set_daemon() -> None:
    # MultiprocessIterator calls Thread.setDaemon, deprecated since Python 3.10.
    if not hasattr(threading.Thread, "setDaemon"):
        threading.Thread.setDaemon = lambda thread, daemon: setattr(thread, "daemon", daemon)


def _multiprocess_iterator(module: types.ModuleType) -> None:
    # Python 3.14 starts processes by forkserver on Linux: they import the script again, whether it
    # guards its main or not, and cannot be handed a dataset that holds a lambda. Scripts of
    # Chainer's time count on fork, and get it unless they have chosen a method.
    def pool(*args, **kwargs):
        default = multiprocessing.get_all_start_methods()[0]
        chosen = multiprocessing.get_start_method(allow_none=True)
        method = "fork" if chosen is None and default == "forkserver" else None
        return multiprocessing.get_context(method).Pool(*args, **kwargs)

    module.multiprocessing = types.SimpleNamespace(**vars(multiprocessing) | {"Pool": pool})


def _onnx_mapping(onnx: types.ModuleType) -> None:
    # onnx 1.20 removed onnx.mapping; onnx_chainer reads three of its tables when imported.
    if _found("onnx.mapping"):
        return
    helper = onnx.helper
    as_numpy = {}
    for tensor_type in helper.get_all_tensor_dtypes():
        try:
            as_numpy[tensor_type] = helper.tensor_dtype_to_np_dtype(tensor_type)
        except (KeyError, TypeError, ValueError):  # a type that NumPy does not have
            continue
    plain = {t: dtype for t, dtype in as_numpy.items() if dtype.kind in "biufc"}
    storage = {helper.tensor_dtype_to_storage_tensor_dtype(t) for t in plain}
    onnx.mapping = _stub(
        "onnx.mapping",
        TENSOR_TYPE_TO_NP_TYPE=as_numpy,
        NP_TYPE_TO_TENSOR_TYPE={dtype: t for t, dtype in plain.items()},
        STORAGE_TENSOR_TYPE_TO_FIELD={s: helper.tensor_dtype_to_field(s) for s in storage},
    )


def _hdf5_strings(hdf5: types.ModuleType) -> None:
    # h5py 3 reads strings as bytes, so that HDF5Deserializer returns "b'abc'" for 'abc'.
    deserialize = hdf5.HDF5Deserializer.__call__

    def call(self, key, value):
        stored = self.group.get(key) if self.group is not None else None
        if isinstance(value, str) and getattr(stored, "shape", None) == ():
            return stored.asstr()[()] if stored.dtype.kind in "OS" else str(stored[()])
        return deserialize(self, key, value)

    hdf5.HDF5Deserializer.__call__ = call


def _categorical(module: types.ModuleType) -> None:
    # From NumPy 2.0 on meshgrid returns a tuple, to which Categorical.log_prob adds a list.
    if isinstance(np.meshgrid(0), list):
        return

    def log_prob(self, x):
        grid = np.meshgrid(*map(range, self.batch_shape), indexing="ij")
        return self.log_p[(*grid, getattr(x, "array", x).astype(np.int32))]

    module.Categorical.log_prob = log_prob


def _caffe_messages(load: Callable[[types.ModuleType], None], module: types.ModuleType) -> None:
    # protobuf 4 and later refuse the classes that an old protoc wrote out for CaffeFunction and the
    # Caffe exporter, yet take the description of them, which stands first, to make them from.
    try:
        load(module)
    except TypeError:
        if "DESCRIPTOR" not in vars(module):
            raise
        from google.protobuf.internal import builder

        builder.BuildMessageAndEnumDescriptors(module.DESCRIPTOR, vars(module))
        builder.BuildTopDescriptorsAndMessages(module.DESCRIPTOR, module.__name__, vars(module))


def _multi_node_iterator(module: types.ModuleType) -> None:
    # NumPy 2.4 made int() of an array with one element and one dimension an error; the iterator
    # does that to the batch size it has received.
    module.int = lambda value: int(value.item() if isinstance(value, np.ndarray) else value)


def _cudnn_advice(cuda: types.ModuleType) -> None:
    # Chainer advises to reinstall CuPy where CuPy has no cuDNN; CuPy 14 never has one. The commands
    # of this package say at their start what computes, so this is for other scripts.
    check = cuda.check_cuda_available

    def check_cuda_available() -> None:
        check()
        if cuda.cudnn_enabled or advice or "resnet.functions" in sys.modules:
            return
        advice.append("CuPy has no cuDNN here (14 and later never have): Chainer does without it")
        warnings.warn(advice[0], stacklevel=2)

    advice: list[str] = []
    check_cuda_available._already_warned = True  # Chainer asks this of the name in its module
    cuda.check_cuda_available = check_cuda_available


def _pillow_names(image: types.ModuleType) -> None:
    # Pillow 10 removed the name by which scripts ask for the best filter.
    vars(image).setdefault("ANTIALIAS", image.LANCZOS)


def _gpu_warnings() -> None:
    # ChainerMN tries NCCL whichever communicator is wanted; pure_nccl itself says what is missing.
    warnings.filterwarnings("ignore", r"\s*nccl library could not be loaded", UserWarning)
    # F.get_item's gradient on a GPU; CuPy 14 still has the method.
    warnings.filterwarnings("ignore", r".*ndarray\.scatter_add. is deprecated", DeprecationWarning)


_AFTER_IMPORT = {
    "PIL.Image": _pillow_names,
    "chainer.backends.cuda": _cudnn_advice,
    "chainer.distributions.categorical": _categorical,
    "chainer.iterators.multiprocess_iterator": _multiprocess_iterator,
    "chainer.serializers.hdf5": _hdf5_strings,
    "chainermn.iterators.multi_node_iterator": _multi_node_iterator,
    "onnx": _onnx_mapping,
}
_AT_IMPORT = {
    "chainer.links.caffe.protobuf3.caffe_pb2": _caffe_messages,
}


class _PatchAfterImport:
    """Meta path finder that applies a patch when the module it is for is loaded, most after it."""

    def find_spec(self, name, path=None, target=None):
        patch, around = _AFTER_IMPORT.get(name), _AT_IMPORT.get(name)
        spec = PathFinder.find_spec(name, path, target) if patch or around else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            load(module)
            patch(module)

        spec.loader.exec_module = partial(around, load) if around else exec_module
        return spec


def apply() -> None:
    """Apply every shim that this Python and these packages need. Calling it again is harmless."""
    if not any(isinstance(finder, _PatchAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchAfterImport())
    _numpy_names()
    _numpy_fromstring()
    _python_names()
    _environment_check()
    _pkg_resources()
    _thread_set_daemon()
    _gpu_warnings()


def main() -> None:
    """Run the script that the command line names, with its arguments, as ``python`` would."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        asked = len(sys.argv) > 1
        print("usage: python -m resnet.compat SCRIPT.py ARGUMENTS",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        sys.exit(0 if asked else 2)
    del sys.argv[0]
    script = sys.argv[0]
    if not os.path.isfile(script):
        print(f"error: {script}: no such file; legal: a Python script", file=sys.stderr)
        sys.exit(2)
    if not sys.flags.safe_path:  # else it has no entry for the script's folder
        del sys.path[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    # The script may have a resnet.py of its own beside it.
    for name in [name for name in sys.modules if name.split(".")[0] == "resnet"]:
        del sys.modules[name]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    from resnet import compat

    compat.main()
else:
    if "resnet.compat" in sys.orig_argv:  # ``python -m``: the package has imported it before
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning, "runpy")
    apply()
