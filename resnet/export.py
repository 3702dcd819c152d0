"""Take a trained network elsewhere: to ONNX, to PyTorch; or from PyTorch to blocks.h5.

python -m resnet.export runs/resnet-20-seed0 --onnx resnet20.onnx
python -m resnet.export runs/resnet-20-seed0 --torch resnet20.pt    and resnet20.py, its module
python -m resnet.export resnet20.th --h5 blocks.h5                  a state dict of akamaster's

Each file takes RGB images, float32 (N, 3, 32, 32) with values from 0 to 1 and any N, and gives
logits (N, classes). What was written is read again and compared: on random and on test images.
The state dicts come from PyTorch ResNets for CIFAR-10 with akamaster's names and option A.
"""

from __future__ import annotations

import argparse
import importlib
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import chainer
import numpy as np
from chainer.serializers import DictionarySerializer, NpzDeserializer

from resnet import (
    cifar10,
    command,
    evaluate,
    extensions,
    files,
    functions,
    pretrained,
    weights,
)
from resnet import network as networks
from resnet.backends.cpu import onednn
from resnet.batches import Images
from resnet.command import USAGE, InputError, Parser
from resnet.network import BLOCKS, CHANNELS, Network

COUNT = 1000  # images of each kind that a written file is compared on
TOLERANCE = 1e-4  # of logits: float32 sums in another order
TORCH_MODULE = Path(__file__).with_name("torch_module.py")
TORCH = "PyTorch is missing: pip install torch"
ONNX = "the extra 'export' is missing: pip install onnx onnxruntime"
TORCH_NAMES = {
    "W": "weight",
    "gamma": "weight",
    "b": "bias",
    "beta": "bias",
    "avg_mean": "running_mean",
    "avg_var": "running_var",
    "N": "num_batches_tracked",
}
FOREIGN_EPS = 1e-5  # of PyTorch's batch normalization
FOREIGN_MEAN = (0.485, 0.456, 0.406)  # that akamaster subtracts from each channel
FOREIGN_DEVIATION = (0.229, 0.224, 0.225)  # and what it divides by
Logits = Callable[[np.ndarray], np.ndarray]


def state(network: chainer.Link) -> dict[str, np.ndarray]:
    """Collect every weight and statistic of a network by name, on the CPU."""
    serializer = DictionarySerializer()
    serializer.save(network)
    return {name: np.array(chainer.cuda.to_cpu(a)) for name, a in serializer.target.items()}


def torch_name(name: str) -> str:
    """Translate a name: conv2/0/bn1/gamma -> conv2.0.bn1.weight."""
    *path, last = name.strip("/").split("/")
    return ".".join((*path, TORCH_NAMES[last]))


class _FromImages(chainer.Chain):
    """The network behind the subtraction of the mean."""

    def __init__(self, network: Network, mean: np.ndarray) -> None:
        super().__init__()
        with self.init_scope():
            self.network = network
            self.mean = chainer.Parameter(mean[None])

    def forward(self, images):
        return self.network(images - self.mean)


def to_onnx(network: Network, description: weights.Description, mean: np.ndarray) -> bytes:
    """Make an ONNX model (opset 11) of the network, by ``onnx_chainer``.

    Args:
        network: The trained network, on the CPU.
        description: What it is; becomes the model's metadata.
        mean: Per-pixel mean of the training images, float32 (3, 32, 32).
    """
    onnx = _require("onnx", ONNX)
    kind = networks.ARCHITECTURES[description.architecture]
    # onnx_chainer knows Chainer's own functions, and was tested with ONNX 1.6.
    with functions.by_chainer(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onnx_chainer

        model = onnx_chainer.export(
            _FromImages(network, mean),
            np.zeros((1, *weights.IMAGE), np.float32),
            graph_name=f"{description.architecture}-{kind.depth(description.n)}",
            opset_version=11,
            input_names=["images"],
            output_names=["logits"],
            input_shapes=("N", *weights.IMAGE),
        )
    graph = model.graph
    weight_names = {tensor.name for tensor in graph.initializer}  # no inputs since IR version 4
    model.ir_version = max(model.ir_version, 4)
    inputs = [each for each in graph.input if each.name not in weight_names]
    del graph.input[:]
    graph.input.extend(inputs)
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    about = {
        "classes": ",".join(description.classes),
        "images": "RGB, float32 (N, 3, 32, 32), values from 0 to 1",
        "trained on": description.dataset,
    }
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def to_torch(network: Network, mean: np.ndarray) -> dict:
    """Make the state dict for ``Network`` of ``resnet/torch_module.py``."""
    torch = _require("torch", TORCH)
    arrays = {torch_name(name): array for name, array in state(network).items()}
    return {name: torch.as_tensor(array) for name, array in {**arrays, "mean": mean}.items()}


def torch_source(description: weights.Description, path: Path) -> str:
    """Write down the module file that goes with the state dict ``path``."""
    source = TORCH_MODULE.read_text(encoding="utf-8")
    source = source.replace("import torch\n", "from pathlib import Path\n\nimport torch\n", 1)
    kind = f'"{description.architecture}", {description.n}, {len(description.classes)}'
    return source + (
        f"\n\nCLASSES = {description.classes!r}\n\n\n"
        f"def load(path=Path(__file__).with_name({path.name!r})):\n"
        '    """The trained network, as at test time; of the state dict beside this file."""\n'
        f"    network = Network({kind})\n"
        "    network.load_state_dict(torch.load(path, weights_only=True))\n"
        "    return network.eval()\n"
    )


def from_torch(path: Path | str) -> tuple[Network, weights.Description, np.ndarray]:
    """Read a state dict of a PyTorch ResNet for CIFAR-10 with akamaster's names.

    Its option A puts the channels of zeros on both sides of x, so that the channels of its later
    blocks are put into another order here. The image's deviation goes into the first
    convolution, the difference between the two epsilons into gamma: at test time the networks
    are the same function.

    Returns:
        The network, what it is, and its mean image.

    Raises:
        InputError: PyTorch is missing, or it is no such state dict.
    """
    torch = _require("torch", TORCH)
    legal = "legal: a state dict of a CIFAR-10 ResNet with akamaster's names and option A"
    try:
        with files.parsing():  # torch can raise anything
            content = _load(torch, files.read(Path(path)))
            content = content.get("state_dict", content)
            arrays = {name.removeprefix("module."): a.numpy() for name, a in content.items()}
    except ValueError as error:
        raise InputError(f"{path}: not a readable state dict ({error}); {legal}") from None
    n = len({name.split(".")[1] for name in arrays if name.startswith("layer1.")})
    if not n or np.shape(arrays.get("linear.bias")) != (len(cifar10.CLASSES),):
        found = ", ".join(sorted(arrays)[:3])
        raise InputError(f"{path}: found {found} ..; {legal}")
    network = networks.resnet(n)
    values = {}
    for name, ours in state(network).items():
        foreign = _foreign_name(name)
        value = arrays.pop(foreign, None)
        if name.endswith("/N"):  # counts updates, of which Chainer makes no use here
            value = ours
        if value is None or value.shape != ours.shape:
            found = "nothing" if value is None else value.shape
            raise InputError(f"{path}: {foreign}: found {found}, legal: {ours.shape}")
        if value.dtype.kind != ours.dtype.kind:
            raise InputError(f"{path}: {foreign}: found {value.dtype}, legal: {ours.dtype}")
        values[name] = value
    if arrays:
        raise InputError(f"{path}: holds {min(arrays)} too, which is no part of a ResNet; {legal}")
    NpzDeserializer(_converted(values, network.conv1.bn.eps)).load(network)
    description = weights.Description(
        "resnet", n, cifar10.OFFICIAL, cifar10.CLASSES, seed=0, epoch=0, iteration=0
    )
    mean = np.broadcast_to(np.float32(FOREIGN_MEAN)[:, None, None], weights.IMAGE)
    return network, description, np.ascontiguousarray(mean)


def _load(torch: ModuleType, content: bytes) -> dict:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # whose own words are a number, or advise to run what is in the file
        raise ValueError("damaged, not by torch.save, or of more than tensors") from None


def _foreign_name(name: str) -> str:
    """conv1/bn/beta -> bn1.bias, conv2/0/conv1/W -> layer1.0.conv1.weight, fc/b -> linear.bias"""
    group, _, rest = torch_name(name).partition(".")
    if group == "conv1":
        return rest.replace("conv.", "conv1.").replace("bn.", "bn1.")
    if group == "fc":
        return f"linear.{rest}"
    return f"layer{BLOCKS.index(group) + 1}.{rest}"


def _converted(values: dict[str, np.ndarray], eps: float) -> dict[str, np.ndarray]:
    """Turn akamaster's arrays, under our names, into our arrays."""
    new = {name: np.asarray(value, np.float64) for name, value in values.items()}
    for name in values:
        if name.endswith("gamma"):
            variance = new[name.replace("gamma", "avg_var")]
            new[name] *= np.sqrt((variance + eps) / (variance + FOREIGN_EPS))
    new["conv1/conv/W"] /= np.float64(FOREIGN_DEVIATION)[:, None, None]
    order = np.arange(CHANNELS[0])  # akamaster's channel that becomes our first, second ...
    for block, channels in zip(BLOCKS, CHANNELS, strict=True):
        before, zeros = order, (channels - len(order)) // 2  # on each side
        if zeros:
            rest = (np.arange(zeros), np.arange(channels - zeros, channels))
            order = np.concatenate((zeros + before, *rest))
        for name in values:
            _, *path = name.split("/")
            if not name.startswith(block):
                continue
            if path[1] == "conv1":  # what it writes, the module keeps to itself
                new[name] = new[name][:, before if path[0] == "0" else order]
            elif path[1] != "bn1" and path[2] != "N":
                new[name] = new[name][order]
    new["fc/W"] = new["fc/W"][:, order]
    return {name: value.astype(values[name].dtype) for name, value in new.items()}


def check(what: str, theirs: Logits, ours: Logits, images: Mapping[str, np.ndarray]) -> None:
    """Print by how much two networks differ on images.

    Args:
        what: Name of the other network.
        theirs: Gives its logits of uint8 images.
        ours: Gives those of this project.
        images: uint8 (N, 3, 32, 32), by their name.

    Raises:
        InputError: They differ by more than float32 sums in another order do.
    """
    for name, x in images.items():
        expected, found = ours(x), theirs(x)
        difference = np.abs(found - expected).max()
        same = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
        print(
            f"{what} beside this project, {len(x):,} {name}: same class for {same:.2%}, "
            f"logits differ by at most {difference:.1e}"
        )
        legal = TOLERANCE * max(1, np.abs(expected).max())
        if not difference <= legal:
            raise InputError(f"{what}: differs by {difference:.1e}, legal: up to {legal:.1e}")


def in_batches(function: Logits) -> Logits:
    """Make a function of uint8 images that calls ``function`` with float32 ones from 0 to 1."""

    def logits(x: np.ndarray) -> np.ndarray:
        parts = range(0, len(x), extensions.EVALUATION_BATCH)
        floats = (x[i : i + extensions.EVALUATION_BATCH] / np.float32(255) for i in parts)
        return np.concatenate([function(part) for part in floats])

    return logits


def write_onnx(path: Path, model: bytes, compare: Callable[[str, Logits], None]) -> None:
    """Write an ONNX model that ONNX Runtime reads and ``compare`` agrees with."""
    runtime = _require("onnxruntime", ONNX)
    with files.whole(path) as temporary:
        temporary.write_bytes(model)
        session = runtime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        compare("ONNX Runtime", in_batches(lambda x: session.run(None, {"images": x})[0]))


def check_has_module(path: Path, description: weights.Description) -> None:
    """Refuse a network that ``resnet/torch_module.py`` cannot be.

    Args:
        path: Where it is.
        description: What it is.

    Raises:
        InputError: It is of another architecture or without some of its blocks, or PyTorch is
            missing.
    """
    legal = _require("resnet.torch_module", TORCH).ARCHITECTURES
    if description.architecture not in legal:
        raise InputError(
            f"--torch: {path} holds {description.architecture}, legal: {', '.join(legal)}; "
            "--onnx exports every architecture"
        )
    if description.groups != networks.GROUPS:
        raise InputError(
            f"--torch: {path} holds {', '.join(description.groups)} alone; "
            "legal: a network with all its blocks"
        )


def check_module_path(path: Path) -> None:
    """Refuse to write a module over a file that is not such a module.

    Args:
        path: The state dict that is to be written; the module stands beside it.

    Raises:
        InputError: It would be lost.
    """
    module_path = path.with_suffix(".py")
    ours = TORCH_MODULE.read_bytes().partition(b"\n")[0]
    if module_path.exists() and not files.read(module_path).startswith(ours):
        raise InputError(
            f"--torch: its module would replace {module_path}, which no export has written; "
            "legal: another name"
        )


def write_torch(
    path: Path, content: dict, source: str, compare: Callable[[str, Logits], None]
) -> Path:
    """Write a state dict that ``compare`` agrees with, and its module beside it."""
    torch = _require("torch", TORCH)
    module_path = path.with_suffix(".py")
    file = io.BytesIO()
    torch.save(content, file)
    with files.whole(path) as temporary, files.whole(module_path) as module_temporary:
        temporary.write_bytes(file.getvalue())
        module_temporary.write_text(source, encoding="utf-8")
        module = ModuleType(module_path.stem)
        module.__file__ = str(module_path)
        exec(compile(source, module_path, "exec"), vars(module))
        network = module.load(temporary)

        def logits(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return network(torch.as_tensor(x)).numpy()

        compare("PyTorch", in_batches(logits))
    return module_path


def _require(name: str, missing: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(missing) from None


def images_of(path: Path, description: weights.Description, data: str | None):
    """Load images of the kind that a network was trained on, uint8; None if there are none."""
    own = "synthetic" if description.dataset == "synthetic" else evaluate.recorded_data(path)
    try:
        return cifar10.load(data or own, may_download=False).test_x[:COUNT]
    except InputError:
        if data:
            raise
        return None


def file_named(ending: str) -> Callable[[str], Path]:
    """Make an argument type: a file whose name ends so."""

    def parse(text: str) -> Path:
        name = command.path(text)
        if name.suffix != ending:
            raise argparse.ArgumentTypeError(f"found '{text}', legal: a name in {ending}")
        return name

    return parse


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    # fmt: off
    add("source", metavar="RUN_OR_FILE_OR_NAME",
        help="run folder, blocks.h5, name of a trained network of the package, or a state dict of "
        "PyTorch in .th, .pt or .pth")
    add("--onnx", type=file_named(".onnx"), metavar="FILE.onnx", help="write an ONNX model")
    add("--torch", type=file_named(".pt"), metavar="FILE.pt",
        help="write a state dict of PyTorch, and FILE.py, its module")
    add("--h5", type=file_named(".h5"), metavar="FILE.h5", help="write a blocks.h5")
    add("--data", metavar="PATH", help="compare on its test images, as for training")
    # fmt: on
    args = p.parse_args()
    if not (args.onnx or args.torch or args.h5):
        raise InputError("nothing to write; legal: --onnx, --torch or --h5 with a file", USAGE)
    if args.torch:
        check_module_path(args.torch)
    if Path(args.source).suffix in (".th", ".pt", ".pth"):
        path = Path(args.source)
        network, description, mean = from_torch(path)
    else:
        path = pretrained.find(args.source)
        network, description = weights.restore(path)
        mean = weights.read_mean(path)
    if args.torch:
        check_has_module(path, description)
    kind = networks.ARCHITECTURES[description.architecture]
    print(f"{path}: {kind.describe(description.n)}")
    rng = np.random.RandomState(0)
    images = {"random images": rng.randint(256, size=(COUNT, *weights.IMAGE)).astype(np.uint8)}
    real = images_of(path, description, args.data)
    if real is None:
        print("no test images here; legal: --data PATH. Compared on random images alone")
    else:
        images["test images"] = real

    # Winograd's convolutions, which are faster, round more.
    exact = "onednn" if onednn.available()[0] else "chainer"

    def ours(x: np.ndarray) -> np.ndarray:
        functions.use(exact)
        no_labels = np.zeros(len(x), np.int32)
        return extensions.predict(network, Images(x, no_labels, mean, chainer.get_device("@numpy")))

    def compare(what: str, theirs: Logits) -> None:
        check(what, theirs, ours, images)

    if args.h5:
        weights.save(args.h5, network, description, mean)
        print(f"wrote {args.h5}")
    if args.onnx:
        write_onnx(args.onnx, to_onnx(network, description, mean), compare)
        print(f"wrote {args.onnx}")
    if args.torch:
        source = torch_source(description, args.torch)
        module = write_torch(args.torch, to_torch(network, mean), source, compare)
        print(f"wrote {args.torch} and its module {module}: {module.stem}.load()")


if __name__ == "__main__":
    command.run(main)
