"""Continual learning of a class-conditional diffusion model with generative distillation and rank-1 EWC.

The paper as one file, read from top to bottom: "Avoid Catastrophic Forgetting with Rank-1 Fisher from
Diffusion Models", Wang, Gupta, Dong, MacLellan, ICLR 2026, arXiv 2509.23593.

    python rank1_ewc.py                                  # 8x8 digits, rank-1 EWC: minutes on a laptop
    python rank1_ewc.py --dataset mnist --method rank1   # the paper's run: a GPU and patience
    torchrun --nproc_per_node 8 rank1_ewc.py --dataset mnist             # the same run on 8 GPUs
    python rank1_ewc.py --report runs                    # Table 1, Figures 4 and 5 of all finished runs
    python rank1_ewc.py --help                           # every setting

Symbols: x0 a clean image in [-1, 1], (B, C, H, W); t a timestep in 0..999, (B,); y a class, (B,); eps
Gaussian noise like x0; theta all weights as one vector (D,); theta* the weights at the end of a task;
g = dl/dtheta the gradient of one sample's loss; mu = E[g]; T the number of tasks.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import platform
import re
import resource
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from io import StringIO
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, NoReturn

# cuBLAS reads this when CUDA starts: without it the same seed may give two results on one GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import cleanfid.features
import cleanfid.fid
import cleanfid.resize
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------
# Settings. PAPER is the paper's; a dataset is a row of what it does differently. METHODS, the other table,
# stands after the functions that its rows name.

PAPER = {
    "tasks": 5,  # in label order, equally many classes each
    "epochs": 200,  # a task
    "batch_size": 128,  # real images a step, and as many replayed ones
    "lr": 2e-4,  # Adam, a fresh one each task
    "lr_decay": "none",  # none: constant | linear: falls to 0 within each task
    "lam": 15000.0,  # EWC's lambda, for this network: a smaller network needs its own
    "channels": [128, 256, 256, 256],  # of the UNet, a level each
    "layers_per_block": 2,
    "dropout": 0.1,  # as written; the authors' code has it off from its first sampling on (--dropout 0)
    "replay_per_class": 5000,
    "sample_steps": 50,  # DDIM
    "fisher_samples": None,  # None: every training image of the task once, at one random (t, eps)
    "fid": "inception",
    "checkpoint_epochs": 1,
}
SMALL = {
    "epochs": 270,  # 810 steps a task
    "batch_size": 64,
    "lr": 4e-3,
    "lr_decay": "linear",
    "lam": 10.0,  # `make lambda`: up to 100 as good as no penalty, 1000 does harm
    "channels": [16, 32],
    "layers_per_block": 1,
    "dropout": 0.0,
    "replay_per_class": 200,
    "sample_steps": 20,
    "fisher_samples": 4000,  # about 20 a training image: mu from 200 would be mostly sampling noise
    "fid": "classifier",
    "checkpoint_epochs": 10,  # an epoch takes 0.2 s and a checkpoint 0.02 s
}
SMALL_32 = SMALL | {  # of --small, for images of 32x32
    "epochs": 1,
    "batch_size": 16,
    "lr": 2e-3,
    "channels": [16, 32, 32, 32],
    "sample_steps": 10,
    "checkpoint_epochs": 1,
}
DATASETS = {
    "digits": PAPER | SMALL,
    "mnist": PAPER,
    "fashion": PAPER,
    "cifar10": PAPER,
    "imagenet32": PAPER | {"tasks": 20, "epochs": 100, "replay_per_class": 1300},  # 50 classes a task
}
SIZES = {  # channels, pixels a side, classes, training and test images
    "digits": (1, 8, 10, 997, 800),
    "mnist": (1, 32, 10, 60000, 10000),
    "fashion": (1, 32, 10, 60000, 10000),
    "cifar10": (3, 32, 10, 50000, 10000),
    "imagenet32": (3, 32, 1000, 1281167, 50000),
}
UNFINISHED = ".rank1_ewc-"  # how a file's name begins while it is written
NUM_STEPS = 1000  # diffusion timesteps
HEAD_CHANNELS = 8  # of the UNet's attention
SAMPLE_BATCH = 100  # images painted together, and a figure's samples drawn together
LOG_EVERY = 10  # training steps
GRADIENTS = 1024  # of single samples kept at once, for F's eigenvectors
GRADIENT_FLOATS = 400_000_000  # the most that these may take: 1.6 GB
CELL = 34  # pixels of an image in a picture, its margin of 2 included
# What changes no number of a run: --small only by the settings it stands for, --accumulate only by rounding
# and by the draws of --dropout.
NO_SETTINGS = ("data_dir", "out", "checkpoint_epochs", "fresh", "small", "accumulate")
NO_SETTINGS += ("figure", "compare", "over", "to", "report", "needs")
OF_PENALTY = {"lam", "curvature", "form", "fisher_samples", "fisher_from"}  # gd has none of these
DAMAGED = Exception  # a file that is cut short, or something else than its name says, may raise anything
# torchrun starts WORLD processes of this script on a machine, and tells each its number:
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0
BAR = {"mininterval": 0.5 if sys.stderr.isatty() else 10, "dynamic_ncols": True, "disable": RANK > 0}


def stop(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    print(f"rank1_ewc: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def all_sum(v: Tensor) -> Tensor:
    """v summed over the processes of torchrun, in place; of a single process, v as it is."""
    if WORLD > 1:
        dist.all_reduce(v)
    return v


def same_for_all(*values: float) -> None:
    """Stop if another process has found other values in the files."""
    v = torch.tensor(values, dtype=torch.float64)
    if not torch.equal(all_sum(v.clone()), v * WORLD):
        stop("the processes do not see the same files: --out must be one folder for all of them")


def rng(seed: int, purpose: str, task: int, device: torch.device) -> torch.Generator:
    """A generator of its own for each purpose and task: one draw more in one place changes no other place."""
    digest = hashlib.sha256(f"{seed} {purpose} {task}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write to a temporary neighbour that then takes the name: the file is there whole or not at all."""
    temporary = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------
# Data. Held as uint8, class after class; a task's training images lie on the device while it is learned, and
# are turned to [-1, 1] a batch at a time.


class Data(NamedTuple):
    """Images (N, C, H, W) uint8 in 0..255 and labels (N,) int64, sorted, for training and for testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 in 0..255, rounded, clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pick(data: Data, train, test) -> Data:
    """Those images and labels that `train` and `test`, indices or slices or masks, say."""
    return Data(data.x[train], data.y[train], data.test_x[test], data.test_y[test])


def sort_classes(data: Data) -> Data:
    """Class after class, in the order in which each class's images were."""
    return pick(data, data.y.argsort(stable=True), data.test_y.argsort(stable=True))


def load_digits(_: Path) -> Data:
    """scikit-learn's 1,797 digits, 1x8x8: 80 of each class drawn for testing, 160 a task."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    x = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]  # (1797, 1, 8, 8)
    y = torch.from_numpy(digits.target).long()
    # The writers come in a periodic order, hence the shuffle; its seed is fixed: a split is data, not chance.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    of_class = [order[y[order] == c] for c in range(10)]
    test, train = (torch.cat([i[part] for i in of_class]) for part in (slice(80), slice(80, None)))
    return pick(Data(x, y, x, y), train, test)


IDX_FILES = {  # name: bytes, of MNIST and FashionMNIST alike
    "train-images-idx3-ubyte": 16 + 60000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60000,
    "t10k-images-idx3-ubyte": 16 + 10000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10000,
}


def load_idx(dataset: type[torchvision.datasets.MNIST], data_dir: Path) -> Data:
    """MNIST or FashionMNIST, padded by 2 to 1x32x32. Downloads what is missing; stops on a damaged file."""
    raw = data_dir / dataset.__name__ / "raw"
    for path, size in ((raw / name, size) for name, size in IDX_FILES.items()):
        if path.is_file() and path.stat().st_size != size:
            stop(f"{path} has {path.stat().st_size:,} bytes, not {size:,}: remove it, to download it again")
    try:
        train, test = (dataset(data_dir, train=train, download=True) for train in (True, False))
        if train.data.shape != (60000, 28, 28) or test.data.shape != (10000, 28, 28):
            raise ValueError("not 28x28 images")
        if train.targets.unique().tolist() != list(range(10)) or test.targets.max() > 9:
            raise ValueError("labels outside 0..9")
    except DAMAGED as error:
        if missing := [name for name in IDX_FILES if not (raw / name).is_file()]:
            stop(
                f"{dataset.__name__} is not complete and cannot be downloaded: put {', '.join(missing)}"
                f" (plain or .gz) into {raw}, or name another folder with --data-dir"
            )
        stop(f"the files in {raw} are damaged ({error}): remove them, to download them again")
    x, test_x = (F.pad(split.data, (2, 2, 2, 2))[:, None] for split in (train, test))
    return sort_classes(Data(x, train.targets, test_x, test.targets))


def load_cifar10(data_dir: Path) -> Data:
    """CIFAR-10, 3x32x32. Its files are pickles; torchvision reads only those with the right MD5."""
    try:
        train, test = (torchvision.datasets.CIFAR10(data_dir, train=t, download=True) for t in (True, False))
    except DAMAGED as error:
        stop(
            f"CIFAR10 is not complete and cannot be downloaded ({error}): put cifar-10-python.tar.gz"
            f" into {data_dir}, or name another folder with --data-dir"
        )
    x, test_x = (torch.from_numpy(split.data).permute(0, 3, 1, 2) for split in (train, test))
    return sort_classes(Data(x, torch.tensor(train.targets), test_x, torch.tensor(test.targets)))


IMAGENET_FILES = [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]


def shrink(path: Path) -> np.ndarray:
    """An image file of any size -> (3072,) uint8, channel, row, column: each pixel the mean of its area."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((32, 32), Image.Resampling.BOX)
    except DAMAGED as error:
        raise OSError(f"{path} is damaged ({error}): put a whole one in its place") from None
    return np.asarray(small).transpose(2, 0, 1).ravel()


def shrink_tree(folder: Path) -> None:
    """train/<wnid>/*.JPEG and val/<wnid>/*.JPEG -> IMAGENET_FILES in shrunk/; labels in wnid order.

    A file that is already there is kept, each is written whole: an interrupted run goes on with the next.
    """
    wnids, others = (sorted(p.name for p in (folder / s).iterdir() if p.is_dir()) for s in ("train", "val"))
    if wnids != others:
        stop(f"{folder}: train and val must have the same folders in them, one a class: n01440764, ..")
    (folder / "shrunk").mkdir(exist_ok=True)
    parts = {}
    for split, names in (("train", IMAGENET_FILES[:-1]), ("val", IMAGENET_FILES[-1:])):
        of_class = [sorted((folder / split / wnid).glob("*.JPEG")) for wnid in wnids]
        images = [(path, label) for label, paths in enumerate(of_class, 1) for path in paths]
        parts |= {name: images[i :: len(names)] for i, name in enumerate(names)}
    if not all(parts.values()):
        stop(f"{folder}: train or val lacks its images, <wnid>/*.JPEG")
    missing = [name for name in parts if not (folder / "shrunk" / name).exists()]
    with ThreadPool() as threads:
        for name in missing:
            paths, labels = zip(*parts[name])
            rows = threads.imap(shrink, paths, chunksize=16)
            data = np.stack([*tqdm(rows, f"shrinking to {name}", len(paths), unit="img", **BAR)])
            with whole(folder / "shrunk" / name) as temporary:
                np.savez(temporary, data=data, labels=np.array(labels))


def load_imagenet32(data_dir: Path) -> Data:
    """ImageNet at 3x32x32 from IMAGENET_FILES (arXiv 1707.08819) or, made into these once, a folder tree.

    Each file: `data` (N, 3072) uint8 in channel, row, column order, `labels` (N,) from 1 on. One file after
    the other is read and its images put where their class belongs: about 5 GB of host memory.
    """
    folder = data_dir / "imagenet32"
    shrunk = folder / "shrunk"  # apart from the official files, whose labels follow another order
    missing, unmade = ([f for f in IMAGENET_FILES if not (where / f).is_file()] for where in (folder, shrunk))
    if missing and unmade and not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        stop(
            f"{folder} lacks {', '.join(missing)}: put the npz files of the downsampled ImageNet (32x32)"
            " there, or the folders train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or name another --data-dir"
        )
    if missing and unmade:
        try:
            shrink_tree(folder)
        except OSError as error:
            stop(str(error))
    folder = shrunk if missing else folder

    def load(name: str, key: str, dtype: type) -> Tensor:
        try:
            with np.load(folder / name, allow_pickle=False) as file:
                return torch.from_numpy(file[key].astype(dtype, casting="same_kind", copy=False))
        except DAMAGED as error:
            stop(f"{folder / name} is damaged ({error}): put a whole one in its place")

    def sorted_by_class(names: list[str]) -> tuple[Tensor, Tensor]:
        labels = [load(name, "labels", np.int64) - 1 for name in names]
        y, order = torch.cat(labels).sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(y)))  # of each image in x
        x = torch.empty(len(y), 3, 32, 32, dtype=torch.uint8)
        for name, where in zip(names, place.split([len(v) for v in labels])):
            data = load(name, "data", np.uint8)
            if data.shape != (len(where), 3072):
                stop(f"{folder / name} holds images of shape {tuple(data.shape)}, not ({len(where)}, 3072)")
            x[where] = data.view(-1, 3, 32, 32)
        return x, y

    data = Data(*sorted_by_class(IMAGENET_FILES[:-1]), *sorted_by_class(IMAGENET_FILES[-1:]))
    classes, tasks = data.y.unique(), DATASETS["imagenet32"]["tasks"]
    if not classes.equal(torch.arange(len(classes))) or not classes.equal(data.test_y.unique()):
        stop(f"the labels in {folder} are not 1, 2, 3, .. in train_data_batch_* and in val_data alike")
    if len(classes) % tasks:
        stop(f"{folder} has {len(classes)} classes, which {tasks} tasks cannot share equally")
    return data


LOADERS: dict[str, Callable[[Path], Data]] = {
    "digits": load_digits,
    "mnist": lambda data_dir: load_idx(torchvision.datasets.MNIST, data_dir),
    "fashion": lambda data_dir: load_idx(torchvision.datasets.FashionMNIST, data_dir),
    "cifar10": load_cifar10,
    "imagenet32": load_imagenet32,
}


def limit_classes(data: Data, n: int) -> Data:
    """The first n images of each class, of those to train and of those to test, of data sorted by class."""
    train, test = (torch.arange(len(y)) - torch.searchsorted(y, y) < n for y in (data.y, data.test_y))
    return pick(data, train, test)


def split_tasks(data: Data, tasks: int) -> list[Data]:
    """The classes in label order, equally many a task; views, no copies, of data sorted by class."""
    per_task = int(data.y.max() + 1) // tasks
    first = torch.arange(tasks + 1) * per_task
    a, b = (torch.searchsorted(y, first).tolist() for y in (data.y, data.test_y))  # where each task begins
    return [pick(data, slice(*i), slice(*j)) for i, j in zip(pairwise(a), pairwise(b))]


# ----------------------------------------------------------------------------------------------------------
# Denoiser: eps_theta(x_t, t, y). The UNet of DDPM (arXiv 2006.11239) as diffusers' UNet2DModel builds it in
# the paper's configuration; the parameters carry the same names, so a state_dict fits both ways.


def double_size(x: Tensor) -> Tensor:
    """Each pixel becomes 2x2. (B, C, H, W) -> (B, C, 2H, 2W)."""
    return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4, 5).flatten(2, 3)


class Resnet(nn.Module):
    """Residual block, the time and class embedding added in its middle; `resample` acts on both its paths."""

    def __init__(self, in_channels, out_channels, temb_channels, groups, dropout, resample=None):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(self.resample(x)) + h


class Attention(nn.Module):
    """Self-attention between all pixels, in heads of HEAD_CHANNELS channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.heads = channels // HEAD_CHANNELS
        self.group_norm = nn.GroupNorm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (
            to(h).unflatten(2, (self.heads, HEAD_CHANNELS)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, 8)
        return x + self.to_out(h.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


class Resample(nn.Module):
    """A 3x3 convolution that halves the resolution (stride 2), or follows a doubling of it."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(double_size(x) if self.up else x)


class Stage(nn.Module):
    """A level's residual blocks, attention (or nothing) after each, then perhaps a change of resolution."""

    def __init__(self, resnets, attentions, downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(downsamplers), nn.ModuleList(upsamplers)


class UNet(nn.Module):
    """Class-conditional denoiser, forward(x_t, t, y) -> eps. At its defaults the paper's network.

    x_t, eps: (B, in_channels, H, W) with H, W multiples of 2^(levels - 1); t: (B,) int in 0..999; y: (B,) int
    in 0..num_classes-1. Attention stands in the middle and at the third level (8x8 of 32x32), where there is
    one. 37,191,681 parameters for 1 channel and 10 classes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int] = (128, 256, 256, 256),
        layers_per_block: int = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        temb, norm_groups = 4 * channels[0], channels[0] // 4
        last = len(channels) - 1

        def resnet(c_in, c_out, resample=None):
            return Resnet(c_in, c_out, temb, norm_groups, dropout, resample)

        def attention(level, c):
            return Attention(c, norm_groups) if level == 2 else nn.Identity()

        def resample(level, c, up):  # where there is attention, a residual block does it
            return resnet(c, c, double_size if up else nn.AvgPool2d(2)) if level == 2 else Resample(c, up)

        self.num_frequencies = channels[0] // 2
        linear_1, linear_2 = nn.Linear(channels[0], temb), nn.Linear(temb, temb)
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        self.class_embedding = nn.Embedding(num_classes, temb)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]
        for level, c in enumerate(channels):
            inputs = [skips[-1]] + [c] * (layers_per_block - 1)
            resnets, attentions = [resnet(i, c) for i in inputs], [attention(level, c) for _ in inputs]
            down = [resample(level, c, up=False)] if level < last else []
            self.down_blocks.append(Stage(resnets, attentions, downsamplers=down))
            skips += [c] * (layers_per_block + len(down))
        self.mid_block = Stage([resnet(c, c), resnet(c, c)], [Attention(c, norm_groups)])
        below = c
        for level, c in reversed(list(enumerate(channels))):
            inputs = [i + skips.pop() for i in [below] + [c] * layers_per_block]
            resnets, attentions = [resnet(i, c) for i in inputs], [attention(level, c) for _ in inputs]
            up = [resample(level, c, up=True)] if level > 0 else []
            self.up_blocks.append(Stage(resnets, attentions, upsamplers=up))
            below = c
        self.conv_norm_out = nn.GroupNorm(norm_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        k = torch.arange(self.num_frequencies, device=x.device)
        angle = t[:, None] * torch.exp(-math.log(10000) * k / self.num_frequencies)
        temb = self.time_embedding["linear_1"](torch.cat([angle.cos(), angle.sin()], 1))
        temb = self.time_embedding["linear_2"](F.silu(temb)) + self.class_embedding(y)  # (B, 4 channels[0])
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down_blocks:
            for resnet, attention in zip(stage.resnets, stage.attentions):
                x = attention(resnet(x, temb))
                skips.append(x)
            for down in stage.downsamplers:
                x = down(x, temb)
                skips.append(x)
        x = self.mid_block.attentions[0](self.mid_block.resnets[0](x, temb))
        x = self.mid_block.resnets[1](x, temb)
        for stage in self.up_blocks:
            for resnet, attention in zip(stage.resnets, stage.attentions):
                x = attention(resnet(torch.cat([x, skips.pop()], 1), temb))
            for up in stage.upsamplers:
                x = up(x, temb)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ----------------------------------------------------------------------------------------------------------
# Diffusion: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, trained to find eps (DDPM, arXiv 2006.11239),
# sampled in few steps without noise (DDIM, arXiv 2010.02502).


@cache
def alphas_cumprod(device: torch.device) -> Tensor:
    """abar_t, the share of the image's variance left at t; betas linear in 1e-4..0.02. (1000,) float32."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_STEPS), 0).to(device)


def add_noise(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. x0, eps (B, C, H, W), t (B,) -> (B, C, H, W)."""
    abar = alphas_cumprod(x0.device)[t][:, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def per_sample_loss(predict: Callable, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor) -> Tensor:
    """l_i = mean over pixels of (eps_theta(x_t, t, y) - eps)^2, section 2 of the paper. -> (B,)."""
    return (predict(add_noise(x0, t, eps), t, y) - eps).square().flatten(1).mean(1)


def draw_noise(x0: Tensor, generator: torch.Generator, timesteps=(0, NUM_STEPS)) -> tuple[Tensor, Tensor]:
    """t ~ U{0..999} (B,), or from the first of `timesteps` to before the second; eps ~ N(0, 1) like x0."""
    t = torch.randint(*timesteps, (len(x0),), generator=generator, device=x0.device)
    return t, torch.randn(x0.shape, generator=generator, device=x0.device)


@torch.no_grad()
def ddim_sample(predict: Callable, noise: Tensor, y: Tensor, steps: int = 50) -> Tensor:
    """DDIM with eta 0, as diffusers' DDIMScheduler has it: noise (B, C, H, W), y (B,) -> x0 in [-1, 1].

    `steps` (1..1000) timesteps ("leading": 980, 960, .., 0 for 50); x0_hat is clipped to [-1, 1], the
    direction keeps the unclipped eps_hat, and the last step goes to abar = 1.
    """
    abar, stride, x = alphas_cumprod(noise.device), NUM_STEPS // steps, noise
    for t in range((steps - 1) * stride, -1, -stride):
        eps = predict(x, torch.full_like(y, t), y).float()  # of bfloat16, where that is on
        x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        abar_next = abar[t - stride] if t else torch.ones_like(abar[0])
        x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps
    return x


def sample_images(model: nn.Module, shape: tuple, y: Tensor, steps: int, generator, name: str) -> Tensor:
    """DDIM images of the classes y (N,), each of `shape` (C, H, W). -> (N, C, H, W) uint8, in eval mode."""
    model.eval()
    images = torch.zeros(len(y), *shape, dtype=torch.uint8, device=y.device)
    with tqdm(total=len(y), desc=name, unit="img", leave=False, **BAR) as bar:
        for i, (part, painted) in enumerate(zip(y.split(SAMPLE_BATCH), images.split(SAMPLE_BATCH))):
            noise = torch.randn(painted.shape, generator=generator, device=y.device)
            if i % WORLD == RANK:  # the others' batches stay 0
                painted.copy_(to_uint8(ddim_sample(model, noise, part, steps)))
            bar.update(len(part))
    return all_sum(images)


# ----------------------------------------------------------------------------------------------------------
# Fisher: F = E[g g^T], taken after a task on that task's real images, in eval mode, at random timesteps.
# Rank-1 (Theorem 1): F ~ c* mu mu^T. Rank-K: F ~ sum_j lambda_j v_j v_j^T, its top eigenpairs. Diagonal (EWC,
# arXiv 1612.00796): F_jj = E[g_j^2]. `draws()` gives one Fisher's samples, this process's part of them;
# `draws(most)` at most so many, to each process all. The same ones at each call.


def flat(tensors) -> Tensor:
    """Weights or gradients, in the order of model.parameters(), as one vector (D,)."""
    return torch.cat([v.detach().flatten() for v in tensors])


def unflat(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """flat's inverse: the vector (D,) as views of the shapes of `tensors`."""
    return [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in tensors]), tensors)]


def dot64(a: Tensor, b: Tensor) -> float:
    """a^T b summed in float64: at D = 37M, float32 would lose the small differences that EWC is about."""
    return float(a.cpu().double() @ b.cpu().double())


def fisher_draws(
    images: Tensor, labels: Tensor, n: int, batch: int, generator, timesteps=(0, NUM_STEPS)
) -> Iterator[tuple]:
    """n samples (x0, t, eps, y) in batches: every image in turn, with random noise at random `timesteps`."""
    # 0, 1, 2, .. and again from 0; or, of more images than n, n at equal distances.
    spread = torch.arange(n, device=images.device) * max(n, len(images)) // n
    for index in (spread % len(images)).split(batch):
        x0 = to_float(images[index])
        yield x0, *draw_noise(x0, generator, timesteps), labels[index]


def losses_at(model: nn.Module, draw: Iterable[Tensor], theta: dict[str, Tensor]) -> Tensor:
    """The per-sample losses (B,) as a function of the weights, for torch.func's derivatives."""
    return per_sample_loss(lambda *x: functional_call(model, theta, x), *draw)


def gradients(model: nn.Module, draws: Iterable[tuple], loss: Callable = losses_at) -> Iterator[Tensor]:
    """g_i of every sample, in chunks (B, D). `loss`: a function like losses_at.

    Making a chunk takes at most 1 GB, or on a GPU a quarter of what is free. Much slower than the backward
    passes of whole batches, which give only the sum of the g_i.
    """
    theta = {name: p.detach() for name, p in model.named_parameters()}
    device = next(iter(theta.values())).device
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 10**9
    chunk = max(1, memory // (8 * sum(p.numel() for p in theta.values())))
    of_one = grad(lambda theta, *sample: loss(model, [v[None] for v in sample], theta)[0])
    for draw in draws:
        for part in zip(*(v.split(chunk) for v in draw)):
            with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels cannot be batched so
                g = vmap(of_one, in_dims=(None, *(0 for _ in part)))(theta, *part)  # each (B, *shape)
            yield torch.cat([v.flatten(1) for v in g.values()], 1)


def gradients_that_fit(model: nn.Module) -> int:
    """How many single gradients may be kept at once: GRADIENTS up to 390,000 weights, 10 of 37 million."""
    return min(GRADIENTS, GRADIENT_FLOATS // sum(p.numel() for p in model.parameters()))


def rank1_fisher(model: nn.Module, draws: Callable[..., Iterable[tuple]]) -> tuple[Tensor, Tensor]:
    """Theorem 1: mu = E[g] (1, D) and c* = E[(mu^T g)^2] / ||mu||^4 (1,), over the same draws, so c* >= 1.

    Time: per batch an ordinary backward pass for mu and a forward-mode derivative for all its mu^T g_i at
    once. Memory: three vectors (D,) and a batch's activations; no per-sample gradient is ever made.
    c* is the least-squares coefficient of F on mu mu^T.
    """
    model.eval()
    params = dict(model.named_parameters())
    mu, n = torch.zeros_like(flat(params.values())), torch.zeros(1)
    for draw in draws():
        loss = per_sample_loss(model, *draw).sum()
        mu += flat(torch.autograd.grad(loss, params.values()))
        n += len(draw[0])
    mu, n = all_sum(mu), float(all_sum(n))
    mu /= n

    norm = math.sqrt(dot64(mu, mu))
    u = dict(zip(params, unflat(mu / norm, [*params.values()])))
    theta = {name: p.detach() for name, p in params.items()}
    second_moment = torch.zeros(1, dtype=torch.float64)  # E[(u^T g)^2]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no forward mode
        for draw in draws():
            _, projections = jvp(partial(losses_at, model, draw), (theta,), (u,))  # (B,) u^T g_i
            second_moment += float(projections.square().sum()) / n
    return mu[None], (all_sum(second_moment) / norm**2).to(mu)  # E[(mu^T g)^2] / ||mu||^4, as mu = norm u


def eigenpairs(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """F = G^T G / N's eigenvalues (N,), falling, and its first k eigenvectors (k, D), of gradients G (N, D).

    From the Gram matrix G G^T / N, which has the same eigenvalues: nothing of size D x D is made.
    """
    values, U = torch.linalg.eigh((G @ G.T).cpu().double() / len(G))
    values, U = values.flip(0).clamp(min=1e-30), U.flip(1)
    return values, (U[:, :k] / (len(G) * values[:k]).sqrt()).T.to(G) @ G


def rank_k_fisher(k: int, model: nn.Module, draws: Callable[..., Iterable[tuple]]) -> tuple[Tensor, Tensor]:
    """F's top eigenvectors v_j (k, D) and eigenvalues lambda_j (k,), from gradients_that_fit.

    Memory: these gradients, at most 1.6 GB, and as much again while they are put together. Stops if they are
    fewer than k.
    """
    model.eval()
    G = torch.cat([*gradients(model, draws(gradients_that_fit(model)))])
    if len(G) < k:
        stop(f"rank {k} needs at least {k} gradients, not {len(G)}: raise --fisher-samples")
    values, vectors = eigenpairs(G, k)
    return vectors, values[:k].to(vectors)


def diagonal_fisher(model: nn.Module, draws: Callable[..., Iterable[tuple]]) -> Tensor:
    """F_jj = E[g_j^2] (D,), as in EWC (arXiv 1612.00796), from the gradients of single samples."""
    model.eval()
    total, n = torch.zeros_like(flat(model.parameters())), torch.zeros(1)
    for g in gradients(model, draws()):
        total += g.square().sum(0)
        n += len(g)
    return all_sum(total) / float(all_sum(n))


# ----------------------------------------------------------------------------------------------------------
# Penalties: what keeps the weights near the old tasks'. Both are the exact sum over all old tasks:
# add(fisher, theta*) after a task, then start(theta) before the next gives its penalty, a function of theta.


class LowRankPenalty:
    """(lam/2) sum_k sum_j c_kj (v_kj^T (theta - theta*_k))^2, over old tasks k and directions j.

    With the one direction mu_k and c*_k it is the paper's rank-1 EWC; or with F_k's top eigenpairs.
    Kept per direction: the vector a = sqrt(c) v (D,) and the number b = a^T theta*_k; no theta*_k.
    """

    def __init__(self, lam: float):
        self.lam, self.a, self.b = lam, None, []

    def add(self, fisher: tuple[Tensor, Tensor], theta_star: Tensor) -> None:
        v, c = fisher
        a = c.sqrt()[:, None] * v
        self.a = a if self.a is None else torch.cat([self.a, a])  # (directions of all tasks, D)
        self.b += [dot64(row, theta_star) for row in a]

    def residual(self, origin: Tensor) -> Tensor:
        """a^T origin - b, in float64; to it a^T (theta - origin) is added: a^T theta - b would cancel."""
        residual = [dot64(a, origin) - b for a, b in zip(self.a, self.b)]
        return torch.tensor(residual, dtype=torch.float32, device=origin.device)

    def start(self, origin: Tensor) -> Callable[[Tensor], Tensor]:
        """The penalty of the task that starts at the weights `origin`."""
        residual = self.residual(origin)
        return lambda theta: self.lam / 2 * (self.a @ (theta - origin) + residual).square().sum()

    def start_proximal(self, origin: Tensor) -> Callable[[Tensor, float], Tensor]:
        """(theta, eta) -> the z that minimizes penalty(z) + ||z - theta||^2 / (2 eta), exactly (Woodbury).

        In the loss, a stiff penalty's gradient enters Adam's second moment and so shrinks the task's steps.
        Here it does not: it is decoupled from Adam, as the weight decay of AdamW (arXiv 1711.05101).
        """
        residual, gram = self.residual(origin), (self.a @ self.a.T).cpu().double()

        def step(theta: Tensor, eta: float) -> Tensor:
            at = (self.a @ (theta - origin) + residual).cpu().double()
            solved = torch.linalg.solve(torch.eye(len(gram)) + eta * self.lam * gram, eta * self.lam * at)
            return theta - solved.to(theta) @ self.a

        return step


class DiagonalPenalty:
    """(lam/2) sum_k sum_j F_k,jj (theta_j - theta*_k,j)^2, EWC (arXiv 1612.00796).

    Two vectors and a number for any number of tasks, the square completed: sum_k F_k (theta - theta*_k)^2 =
    H (theta - center)^2 + rest, with H = sum_k F_k.
    """

    def __init__(self, lam: float):
        self.lam, self.H, self.center, self.rest = lam, 0.0, 0.0, 0.0

    def add(self, fisher: Tensor, theta_star: Tensor) -> None:
        H, step = self.H + fisher, theta_star - self.center
        share = torch.where(H > 0, fisher / H, 0.0)  # of the new task in the weighted mean
        self.rest += dot64(self.H * share, step.square())
        self.H, self.center = H, self.center + share * step

    def start(self, origin: Tensor) -> Callable[[Tensor], Tensor]:
        """Here nothing depends on the origin: each weight is compared with its own centre."""
        return lambda theta: self.lam / 2 * ((self.H * (theta - self.center).square()).sum() + self.rest)


class Method(NamedTuple):
    """A row of Table 1: replayed images or not, distillation or not, which Fisher with which penalty."""

    replay: bool = False
    distill: bool = False
    fisher: Callable | None = None
    penalty: type | None = None
    joint: bool = False  # not continual: all classes at once


METHODS = {
    "joint": Method(joint=True),
    "finetune": Method(),
    "replay": Method(replay=True),
    "gd": Method(replay=True, distill=True),
    "diag-only": Method(fisher=diagonal_fisher, penalty=DiagonalPenalty),
    "rank1-only": Method(fisher=rank1_fisher, penalty=LowRankPenalty),
    "diag": Method(replay=True, distill=True, fisher=diagonal_fisher, penalty=DiagonalPenalty),
    "rank1": Method(replay=True, distill=True, fisher=rank1_fisher, penalty=LowRankPenalty),
}
TABLE_1 = (*METHODS,)
# Beyond the paper: F's top eigenvector in mu's place, and its top K.
METHODS |= {
    name: Method(True, True, partial(rank_k_fisher, k), LowRankPenalty)
    for name, k in (("rank1-eig", 1), ("rank2", 2), ("rank4", 4), ("rank8", 8))
}


# ----------------------------------------------------------------------------------------------------------
# Generative distillation (arXiv 2311.14028): the teacher, the frozen model of the last task, paints images of
# all old classes; the student denoises them like real ones and imitates the teacher on them.


def replay_pool(
    teacher: nn.Module, shape: tuple, num_old: int, per_class: int, steps: int, generator, name: str
) -> tuple[Tensor, Tensor]:
    """The teacher's images of the classes 0..num_old-1, `per_class` of each. -> (N, C, H, W) uint8, (N,)."""
    y = torch.arange(num_old, device=generator.device).repeat_interleave(per_class)
    return sample_images(teacher, shape, y, steps, generator, name), y


def losses(
    student: nn.Module, teacher: nn.Module | None, draw: tuple, num_real: int, part=slice(None)
) -> tuple[Tensor, Tensor]:
    """Denoising loss over [real, replay], and L_GD: the student's distance from the teacher on the replay.

    draw: the batch, x0 (B, C, H, W) in [-1, 1] with the num_real real images first, t (B,), eps like x0,
    y (B,). Of the batch only the rows `part` (a slice) are computed, and the losses scaled so that those of
    all parts add up to the batch's means. ONE student pass serves both losses: the authors pass the replay
    images again, at an independent (t, eps): the same expectation, half as much again to compute.
    """
    x0, t, eps, y = (v[part].contiguous() for v in draw)  # other strides would be compiled anew
    x_t, real = add_noise(x0, t, eps), len(range(num_real)[part])  # so many of these rows are real
    eps_student = student(x_t, t, y)
    denoise = F.mse_loss(eps_student, eps) * (len(y) / len(draw[0]))
    if teacher is None:
        return denoise, torch.zeros_like(denoise)
    with torch.no_grad():
        eps_teacher = teacher(x_t[real:], t[real:], y[real:])
    distill = F.mse_loss(eps_student[real:], eps_teacher)
    return denoise, distill * ((len(y) - real) / (len(draw[0]) - num_real))


# ----------------------------------------------------------------------------------------------------------
# Metric: FID of a task's test images against as many samples with the same labels (arXiv 1706.08500), on
# clean-fid's Inception features (arXiv 2104.11222) or, with no download, on a small classifier's.

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rank1_ewc"


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """clean-fid's ||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features (N_a, d), (N_b, d), N >= 2.

    With A, B the centred features over sqrt(N - 1) and M = A B^T, the last trace is that of (M M^T)^1/2, from
    eigenvalues: no matrix square root, which is ten times slower and warns or fails where N < d (singular S).
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    # QR's R in A's place: d rows instead of N, and the same A^T A.
    A, B = (np.linalg.qr((v - v.mean(0)) / math.sqrt(len(v) - 1), mode="r") for v in (a, b))
    M = A @ B.T
    cross = np.sqrt(np.linalg.eigvalsh(M @ M.T).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.square(A).sum() + np.square(B).sum() - 2 * cross)


def inception_features(device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """images (N, 1 or 3, H, W) uint8 -> clean-fid's Inception features (N, 2048). Stops without weights."""
    try:
        model = cleanfid.features.build_feature_extractor("clean", device, use_dataparallel=False)
    except DAMAGED as error:
        stop(
            f"clean-fid's Inception weights cannot be loaded or downloaded ({error}): put a whole"
            " inception-2015-12-05.pt into /tmp, or use --fid classifier, which needs no download"
        )
    resize = cleanfid.resize.build_resizer("clean")

    def features(images: Tensor) -> np.ndarray:
        found = []
        for part in images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().split(50):
            resized = np.stack([resize(image) for image in part.numpy()])  # (50, 299, 299, 3) in 0..255
            batch = torch.from_numpy(resized).permute(0, 3, 1, 2)
            found.append(cleanfid.fid.get_batch_features(batch, model, device))
        return np.concatenate(found)

    return features


def classifier_features(name: str, data: Data, device) -> tuple[Callable[[Tensor], np.ndarray], float]:
    """images uint8 -> the penultimate features (N, 64) of a small CNN of `data`; and its test accuracy.

    Trained for 1,000 steps on the real training images, always with the same seed, and kept in CACHE under a
    digest of them and the network.
    """
    channels, size = data.x.shape[1:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1),
            nn.SiLU(),  # smooth: a unit that is dead on two classes would make their covariance singular
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * math.ceil(size / 4) ** 2, 64),
            nn.SiLU(),
            nn.Linear(64, int(data.y.max()) + 1),
        ).to(device)
    digest = hashlib.sha256(str(model).encode())
    for v in (data.x, data.y):
        digest.update(v.numpy())
    path = CACHE / f"classifier-{name}-{digest.hexdigest()[:12]}.pt"
    if path.exists():
        try:
            model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        except DAMAGED as error:
            stop(f"{path} is damaged ({type(error).__name__}): remove it, and it is made again")
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        generator = rng(0, "classifier", 0, torch.device("cpu"))
        for _ in tqdm(range(1000), desc="classifier for the FID", unit="step", leave=False, **BAR):
            index = torch.randint(len(data.y), (128,), generator=generator)
            x, y = data.x[index].to(device), data.y[index].to(device)
            loss = F.cross_entropy(model(to_float(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with suppress(OSError):  # a cache that cannot be written costs a minute, not the run
            CACHE.mkdir(parents=True, exist_ok=True)
            with whole(path) as temporary:
                torch.save(model.state_dict(), temporary)

    @torch.no_grad()
    def apply(layers: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([layers(to_float(part.to(device))) for part in images.split(1000)]).cpu()

    accuracy = (apply(model, data.test_x).argmax(1) == data.test_y).float().mean().item()
    return lambda images: apply(model[:-1], images).numpy(), accuracy


def afid_and_forgetting(fid: list[list[float | None]]) -> tuple[list[float], float | None]:
    """fid[j][k]: FID on task k after task j, None for k > j. -> AFID after each task, final forgetting.

    AFID_j = mean over k <= j of FID_k(m_j); F = (1/T) sum_k (FID_k(m_T) - FID_k(m_k)). Lower is better.
    Joint training has one row, of all tasks, and forgets nothing: None.
    """
    afid = [float(np.mean([v for v in row if v is not None])) for row in fid]
    T = len(fid[-1])
    return afid, sum(fid[-1][k] - fid[k][k] for k in range(T)) / T if len(fid) == T else None


# ----------------------------------------------------------------------------------------------------------
# One task; the loop over tasks; and the checkpoint from which a stopped run goes on.


def speedup(cfg, name: str, device: torch.device) -> bool:
    """Whether --bf16 or --compile is on: said so, or not said and on a GPU that is made for it."""
    made_for_it = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return made_for_it if getattr(cfg, name) is None else getattr(cfg, name)


def autocast(cfg, device: torch.device) -> torch.autocast:
    """bfloat16 in convolutions and matrix products, for tensor cores; weights and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=speedup(cfg, "bf16", device))


def can_compile(cfg, model: nn.Module, shape: tuple, device: torch.device) -> bool:
    """Compile a copy for a step of training; the model shares its code. Says so where that does not work."""
    torch._dynamo.config.recompile_limit = 32  # student and teacher, training and sampling, some sizes
    n, probe = cfg.batch_size // (WORLD * cfg.accumulate), copy.deepcopy(model)
    x, zeros = torch.zeros(n, *shape, device=device), torch.zeros(n, dtype=torch.long, device=device)
    try:
        probe.compile()
        with autocast(cfg, device):
            probe(x, zeros, zeros + 1).sum().backward()
    except Exception as error:  # noqa: BLE001, of many kinds: no compiler, or one that does not fit
        print(f"note: torch.compile does not work here ({type(error).__name__}), going on without it")
        return False
    return True


def train_task(
    cfg, task: int, done: int, model, optimizer, generators, teacher, held, x, y, pool, log, after_epoch
) -> None:
    """Train on one task, of which `done` epochs are done: L_total = denoising + distillation + penalty.

    x (N, C, H, W) uint8 and y (N,) are the task's real images; pool is the replay's (x, y) or None; teacher
    and `held`, the penalty as a function of theta, may be None. Writes mean losses to `log`, stops when one
    is not finite, and calls after_epoch(epochs done) after each epoch.
    """
    params, device, parts = list(model.parameters()), x.device, WORLD * cfg.accumulate
    batch = min(cfg.batch_size, len(x))  # every step has full batches: an epoch leaves out a random remainder
    per_epoch = len(x) // batch
    step, steps = done * per_epoch, cfg.epochs * per_epoch
    recent = []
    model.train()
    name = f"task {task + 1}/{cfg.tasks} {cfg.method}"
    with tqdm(initial=step, total=steps, desc=name, unit="step", **BAR) as bar:
        for epoch in range(done + 1, cfg.epochs + 1):
            shuffled = torch.randperm(len(x), generator=generators["order"], device=device)
            dropout = torch.randint(2**62, (), generator=generators["dropout"], device=device)
            torch.manual_seed(int(dropout) + RANK)  # nn.Dropout can only draw from the global generator
            for index in shuffled[: per_epoch * batch].split(batch):
                batch_x, batch_y = x[index], y[index]
                if pool:
                    old = torch.randint(len(pool[0]), (batch,), generator=generators["replay"], device=device)
                    batch_x, batch_y = torch.cat([batch_x, pool[0][old]]), torch.cat([batch_y, pool[1][old]])
                x0 = to_float(batch_x)
                draw = x0, *draw_noise(x0, generators["noise"]), batch_y
                optimizer.zero_grad()
                both = torch.zeros(2, device=device)  # denoising loss, distillation
                for i in range(RANK, parts, WORLD):  # each process takes its rows, in --accumulate turns
                    with autocast(cfg, device):
                        denoise, distill = losses(model, teacher, draw, batch, slice(i, None, parts))
                    (denoise + distill).backward()
                    both += torch.stack([denoise, distill]).detach()
                ewc = torch.zeros((), device=device)
                if held:  # each process adds its share, so that their sum has the penalty once
                    ewc = held(torch.cat([p.flatten() for p in params])) / WORLD
                    ewc.backward()
                if WORLD > 1:
                    for p, g in zip(params, unflat(all_sum(flat(p.grad for p in params)), params)):
                        p.grad = g
                if cfg.lr_decay == "linear":
                    optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / steps)
                optimizer.step()

                step += 1
                recent.append(torch.cat([both, ewc.detach()[None]]))
                if step % LOG_EVERY and step % per_epoch and step > 1:  # reading a loss waits for the GPU
                    continue
                values = all_sum(torch.stack(recent)).cpu()  # (steps since the last log, 3)
                if not values.isfinite().all():
                    bad = step - len(values) + 1 + int((~values.isfinite().all(1)).nonzero()[0])
                    bar.close()
                    lower = f"lower --lr (now {cfg.lr:g}) or --lam (now {cfg.lam:g})"
                    stop(f"the loss of task {task + 1} is no longer finite at step {bad} of {steps}: {lower}")
                means = dict(zip(("denoise", "distill", "ewc"), values.mean(0).tolist()))
                log.write(json.dumps({"task": task + 1, "epoch": epoch, "step": step} | means) + "\n")
                bar.set_postfix({k: f"{v:.4f}" for k, v in means.items() if v}, refresh=False)
                bar.update(step - bar.n)
                recent = []
            after_epoch(epoch)


def proximal(step: Callable[[Tensor, float], Tensor], model: nn.Module, optimizer, *_) -> None:
    """The optimizer's hook of --form proximal: after each of its steps, theta becomes step(theta, lr)."""
    params = [*model.parameters()]
    theta = step(flat(params), optimizer.param_groups[0]["lr"])
    for p, v in zip(params, unflat(theta, params)):
        p.data.copy_(v)


def passes_of_a_run(cfg, method: Method, tasks: list[Data]) -> Counter:
    """How often a run passes one image forward through the network, by part; a backward pass counts as two.

    The replay grows with the square of the number of tasks: every task paints all old classes anew.
    """
    passes = Counter()
    for k, task in enumerate(tasks):
        replay, distill = k > 0 and method.replay, k > 0 and method.distill
        passes["training"] += cfg.epochs * len(task.y) * (3 + 3 * replay + distill)  # real, replay, teacher
        if method.fisher and k + 1 < len(tasks):
            passes["Fisher"] += 6 * (cfg.fisher_samples or len(task.y))  # two derivatives
        passes["replay"] += cfg.sample_steps * replay * cfg.replay_per_class * k * len(task.y.unique())
        if not method.joint or k + 1 == len(tasks):
            passes["FID"] += cfg.sample_steps * sum(len(t.test_y) for t in tasks[: k + 1])
    return passes


def passes_per_second(model: nn.Module, shape: tuple, batch: int, device: torch.device) -> float:
    """Forward passes of an image in a second, from training steps of 1, 1, 2, 4, .. up to `batch` images."""
    for i, n in enumerate([1, *(2**i for i in range(batch.bit_length()) if 2**i < batch), batch]):
        x, zeros = torch.zeros(n, *shape, device=device), torch.zeros(n, dtype=torch.long, device=device)
        started = time.perf_counter()
        model(x, zeros, zeros).sum().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - started
        if i and seconds > 2:  # long enough to be measured; but the first step also loads what it needs
            break
    return 3 * n / seconds


def announce(seconds: float) -> None:
    """Say how long the whole run will take and, if that is more than an afternoon, what makes it minutes."""
    units = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((u for u, size in units.items() if seconds >= 2 * size), "seconds")
    hint = "\nFor a quick look in minutes: --small --limit 50" if seconds > 3 * 3600 else ""
    tqdm.write(f"At this rate the whole run takes about {seconds / units[unit]:.0f} {unit}.{hint}")


def hours_by_part(cfg, method: str, tasks: int, rate: float) -> dict[str, float]:
    """The hours of a run of `tasks` tasks, each as large as cfg.dataset's, at `rate` passes a second."""
    classes, *counts = (v * tasks // cfg.tasks for v in SIZES[cfg.dataset][2:])
    y, test_y = (torch.arange(n) * classes // n for n in counts)
    passes = passes_of_a_run(cfg, METHODS[method], split_tasks(Data(y, y, test_y, test_y), tasks))
    hours = {part: n / rate / 3600 for part, n in {**passes, "all": passes.total()}.items()}
    return {part: round(h, 2 if h < 10 else None) for part, h in hours.items()}


def needs(path: Path, device: torch.device) -> None:
    """What a run of each dataset and method would take on this device, without its data: JSON in `path`.

    hours: computed from the network's passes in a run and the measured passes a second; hours_of_tasks: of
    rank1 by part, for this and other numbers of tasks, each as large. gb_weights: in memory for the model,
    its gradient, Adam's two moments, the teacher and the penalty (the activations come on top);
    gb_checkpoint: the same on disk, less the gradient.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {"device": name, "threads": torch.get_num_threads()}
    for dataset, (channels, size, classes, *_) in SIZES.items():
        cfg = parse_args(["--dataset", dataset])
        model = UNet(channels, classes, cfg.channels, cfg.layers_per_block, cfg.dropout).to(device)
        with autocast(cfg, device):
            rate = passes_per_second(model, (channels, size, size), 2 * cfg.batch_size, device)
        gb = 4e-9 * sum(p.numel() for p in model.parameters())
        vectors = {"gd": 4, "diag": 6, "rank1": 3 + cfg.tasks}  # on disk: model, moments, teacher; Fisher
        found[dataset] = {
            "passes_per_second": round(rate, 1),
            "hours": {m: hours_by_part(cfg, m, cfg.tasks, rate)["all"] for m in TABLE_1},
            "hours_of_tasks": {n: hours_by_part(cfg, "rank1", n, rate) for n in sorted({cfg.tasks, 20, 100})},
            "gb_weights": {m: round((v + 1) * gb, 3) for m, v in vectors.items()},
            "gb_checkpoint": {m: round(v * gb, 3) for m, v in vectors.items()},
        }
        print(dataset, found[dataset], flush=True)
    write_json(path, found)


def describe_fisher(method: Method, fisher: tuple[Tensor, Tensor] | Tensor) -> dict:
    """What to watch: the diagonal's trace; or c* and ||mu||; or the eigenvalues.

    "energy" is F along mu or the first eigenvector: times lambda, the curvature that the penalty adds.
    """
    if isinstance(fisher, Tensor):
        return {"trace": float(fisher.sum())}
    (v, *_), c = fisher
    along_mu = {"c_star": float(c[0]), "mu_norm": float(v.norm())}
    found = along_mu if method.fisher is rank1_fisher else {"eigenvalues": c.tolist()}
    return found | {"energy": float(c[0] * v.norm() ** 2)}


def peak_memory_mb(device: torch.device) -> float:
    """The most that this process has had: of the GPU's memory or, on a CPU, of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def read_result(path: Path) -> dict:
    """A run's result.json. Stops if it is not one."""
    try:
        result = json.loads(path.read_text())
        result["config"]["fid_features"], table(result)  # fails if anything of this is missing
    except DAMAGED as error:
        stop(f"{path} is damaged ({type(error).__name__}): remove it or give --fresh, to start over")
    return result


def settings_of(cfg: argparse.Namespace) -> dict:
    """What the numbers of a run depend on: all of the command line but NO_SETTINGS."""
    return {key: value for key, value in vars(cfg).items() if key not in NO_SETTINGS}


def refuse_other(saved: dict, cfg: argparse.Namespace, path: Path) -> None:
    """Stop if `path` is of a run with other settings, and name the first that differs."""
    for key, value in settings_of(cfg).items():
        if saved.get(key) != value:
            flag = f"--{key.replace('_', '-')} {saved.get(key)}"
            stop(f"{path} was made with {flag}, not {value}: --fresh starts over, --out names another folder")


def load_checkpoint(path: Path, cfg: argparse.Namespace) -> dict | None:
    """The state of a stopped run, None if there is none. Stops if it is damaged or of other settings."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # read as it is used
        refuse_other(saved["settings"], cfg, path)
    except DAMAGED as error:
        stop(f"{path} is damaged ({type(error).__name__}): remove it or give --fresh, to start over")
    return saved


def run(cfg: argparse.Namespace, data: Data, features: Callable[[Tensor], np.ndarray], device) -> dict:
    """Train task after task and measure after each. Writes into cfg.out and returns what result.json holds.

    data: all images, sorted by class; features: images uint8 -> FID features (N, d). Goes on from the
    checkpoint in cfg.out if there is one: on a CPU to the same numbers as if it had never been stopped.
    """
    method, tasks = METHODS[cfg.method], split_tasks(data, cfg.tasks)
    lessons = [data] if method.joint else tasks  # what is trained on, one after the other
    if WORLD * cfg.accumulate > (smallest := min(cfg.batch_size, *(len(lesson.x) for lesson in lessons))):
        stop(f"a batch of {smallest} is too small for {WORLD} processes and --accumulate {cfg.accumulate}")
    shape, steps, num_classes = data.x.shape[1:], cfg.sample_steps, int(data.y.max()) + 1
    per_task = num_classes // cfg.tasks
    saved = load_checkpoint(cfg.out / "checkpoint.pt", cfg) or {}  # of this run, if it was stopped
    first, epoch = saved.get("task", 0), saved.get("epoch", 0)  # where it goes on: after so many epochs
    same_for_all(first, epoch)
    fid, fishers, peak_mb = saved.get("fid", []), saved.get("fisher", []), saved.get("peak_mb", 0.0)
    seconds, clock = Counter(saved.get("seconds")), time.perf_counter()

    def lap(name: str) -> None:  # the time since the last lap was spent on `name`
        nonlocal clock
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        seconds[name] += now - clock
        clock = now

    torch.manual_seed(cfg.seed)  # the global generator: initial weights, and with a seed of its own dropout
    model = UNet(shape[0], num_classes, cfg.channels, cfg.layers_per_block, cfg.dropout).to(device)
    penalty = method.penalty(cfg.lam) if method.penalty else None
    average = None  # of the weights, with --ema
    if saved:
        tqdm.write(f"going on in task {first + 1}/{cfg.tasks} after epoch {epoch}, from {cfg.out}")
        for name, value in saved["penalty"].items():
            setattr(penalty, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)
    else:
        batch = 2 * cfg.batch_size // (WORLD * cfg.accumulate)
        with autocast(cfg, device):
            rate = WORLD * passes_per_second(model, shape, batch, device)
        announce(passes_of_a_run(cfg, method, tasks).total() / rate)
    if compiled := speedup(cfg, "compile", device) and can_compile(cfg, model, shape, device):
        model.compile()

    def features_of(images: Tensor) -> np.ndarray:  # every process those of its images
        mine = torch.from_numpy(features(images[RANK::WORLD]))
        found = mine.new_zeros(len(images), mine.shape[1])
        found[RANK::WORLD] = mine
        return all_sum(found).numpy()

    real = [features_of(task.test_x) for task in tasks]
    # What a perfect model would score: as many training images, at random, in the place of samples.
    generator = rng(cfg.seed, "real", 0, torch.device("cpu"))
    others = (t.x[torch.randperm(len(t.x), generator=generator)[: len(t.test_x)]] for t in tasks)
    fid_real = [frechet_distance(a, features_of(images)) for a, images in zip(real, others)]
    # The pictures: ten samples of two classes of each task.
    shown = [t * per_task + c for t in range(cfg.tasks) for c in range(min(per_task, 2))]
    shown = torch.tensor(shown, device=device).repeat_interleave(10)
    lap("fid")

    def draws(k: int, x: Tensor, y: Tensor, most: float = math.inf) -> Iterator[tuple]:  # of the k-th Fisher
        n, generator = min(cfg.fisher_samples or len(x), most), rng(cfg.seed, "fisher", k, device)
        # With `most` every process gets whole batches; without, its rows of each, in --accumulate turns.
        parts = WORLD * cfg.accumulate if most == math.inf else 1
        for draw in fisher_draws(x, y, n, cfg.batch_size, generator, (cfg.fisher_from or 0, NUM_STEPS)):
            for i in range(RANK if parts > 1 else 0, min(parts, len(draw[0])), WORLD):
                yield [v[i::parts] for v in draw]

    def checkpoint(epoch: int) -> None:  # where this run stands: after `epoch` epochs of task k
        if RANK or (epoch % cfg.checkpoint_epochs and epoch < cfg.epochs):
            return
        lap("train")
        state = {"settings": settings_of(cfg), "task": k, "epoch": epoch, "log": log.tell()}
        state |= {"fid": fid, "fisher": fishers, "seconds": dict(seconds)}
        state |= {"peak_mb": max(peak_mb, peak_memory_mb(device))}
        state |= {"generators": {purpose: g.get_state() for purpose, g in generators.items()}}
        state |= {"penalty": vars(penalty) if penalty else {}}
        state |= {name: module.state_dict() if module else {} for name, module in modules.items()}
        with whole(cfg.out / "checkpoint.pt") as temporary:
            torch.save(state, temporary)
        lap("checkpoint")

    log_file = os.devnull if RANK else cfg.out / "log.jsonl"  # rank 0 alone writes
    with open(log_file, "a" if saved else "w", buffering=1) as log:
        if saved and not RANK:
            log.truncate(min(saved["log"], log.tell()))
        for k in range(first, len(lessons)):
            # Before the task: the model so far becomes the teacher, and paints the old classes.
            x, y = (v.to(device) for v in lessons[k][:2])
            learned = average.module if average else model
            teacher = copy.deepcopy(learned).eval().requires_grad_(False) if k else None
            if teacher and compiled:
                teacher.compile()  # as the last teacher was: the same code, other weights
            optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
            average = cfg.ema and AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
            modules = {"model": model, "teacher": teacher, "average": average, "optimizer": optimizer}
            purposes = ("order", "replay", "noise", "dropout")
            generators = {purpose: rng(cfg.seed, purpose, k, device) for purpose in purposes}
            if saved:
                for name, module in modules.items():
                    if module:
                        module.load_state_dict(saved[name])
                for purpose, g in generators.items():
                    g.set_state(saved["generators"][purpose])
                saved = None
            else:
                epoch = 0
                checkpoint(epoch)
            held = pool = None
            if k and penalty:
                origin = flat(teacher.parameters())  # of the checkpoint: the same after a stop in mid-task
                if cfg.form == "proximal":
                    hook = partial(proximal, penalty.start_proximal(origin), model)
                    optimizer.register_step_post_hook(hook)
                else:
                    held = penalty.start(origin)
            if average:  # the last hook: it averages what the step ends with
                optimizer.register_step_post_hook(lambda *_, a=average: a.update_parameters(model))
            if k and method.replay and epoch < cfg.epochs:
                sampling = cfg.replay_per_class, steps, rng(cfg.seed, "pool", k, device)
                with autocast(cfg, device):
                    pool = replay_pool(teacher, shape, k * per_task, *sampling, f"task {k + 1} replay")
                lap("sample")

            taught = teacher if method.distill else None
            train_task(cfg, k, epoch, model, optimizer, generators, taught, held, x, y, pool, log, checkpoint)
            pool = None  # the next one needs its memory

            # After it: which direction in weight space matters to it, then the FID of all tasks so far.
            if penalty and k + 1 < len(lessons):
                with torch.compiler.set_stance("force_eager"):  # torch.func needs the code itself
                    fisher = method.fisher(model, partial(draws, k, x, y))
                penalty.add(fisher, flat(model.parameters()))
                fishers.append(describe_fisher(method, fisher))
                if cfg.curvature and k == 0:
                    penalty.lam = cfg.curvature / fishers[0]["energy"]
                lap("fisher")
            x = y = None  # of all images, only the current task's are on the device
            seen = cfg.tasks if method.joint else k + 1
            labels = [task.test_y for task in tasks[:seen]]
            y, generator = torch.cat(labels).to(device), rng(cfg.seed, "fid", k, device)
            with autocast(cfg, device):
                samples = sample_images(model, shape, y, steps, generator, f"task {k + 1} FID samples")
                generator = rng(cfg.seed, "picture", 0, device)  # the same noise after every task
                picture = sample_images(model, shape, shown, steps, generator, "pictures")
            if not RANK:
                save_samples(picture[: seen * len(shown) // cfg.tasks], cfg.out / f"samples-task{seen}.png")
            lap("sample")
            painted = samples.split([len(v) for v in labels])
            row = [frechet_distance(a, features_of(images)) for a, images in zip(real, painted)]
            fid.append(row + [None] * (cfg.tasks - seen))
            numbers = "  ".join(f"{v:.1f}" for v in row)
            tqdm.write(f"after task {seen}, FID (features: {cfg.fid_features}): {numbers}")
            lap("fid")

    afid, forgetting = afid_and_forgetting(fid)
    packages = ("torch", "torchvision", "clean-fid", "scipy", "numpy", "scikit-learn")
    result = {"dataset": cfg.dataset, "method": cfg.method, "seed": cfg.seed}
    result |= {"lam": penalty.lam if penalty else 0.0, "fid": fid, "afid": afid, "forgetting": forgetting}
    result |= {"fid_features": cfg.fid_features, "fid_real": fid_real, "fisher": fishers}
    result |= {"config": settings_of(cfg), "processes": WORLD, "compiled": compiled}
    result |= {"bf16": speedup(cfg, "bf16", device), "peak_mb": round(max(peak_mb, peak_memory_mb(device)))}
    result |= {"versions": {"python": platform.python_version()} | {p: version(p) for p in packages}}
    result |= {"seconds": {key: round(value, 1) for key, value in sorted(seconds.items())}}
    if not RANK:
        with whole(cfg.out / "model.pt") as temporary:
            torch.save(model.state_dict(), temporary)
        plot_fid(result, cfg.out / "fid.png")
        write_json(cfg.out / "result.json", result)
    return result


# ----------------------------------------------------------------------------------------------------------
# What a run shows: a table, pictures, curves.


def table(result: dict) -> str:
    """The FID matrix, AFID and forgetting as lines of text."""
    tasks = len(result["fid_real"])
    rows = ["after task  " + "".join(f"{f'task {k + 1}':>9}" for k in range(tasks)) + "     AFID"]
    for row, afid in zip(result["fid"], result["afid"]):
        cells = [f"{v:9.1f}" if v is not None else " " * 9 for v in [*row, afid]]
        rows.append(f"{tasks - row.count(None):>10}  " + "".join(cells))
    rows.append("real images " + "".join(f"{v:9.1f}" for v in result["fid_real"]) + "   (training, not test)")
    if found := curvatures(result):
        curvature = "".join(f"{v:9.3g}" for v in found)
        rows += ["", f"curvature   {curvature}   (lambda c* ||mu||^2, what the penalty adds along mu)"]
    title = f"{result['dataset']}, {result['method']}: FID of each task (features: {result['fid_features']})"
    forgetting = "-" if result["forgetting"] is None else f"{result['forgetting']:.2f}"
    final = f"AFID {result['afid'][-1]:.2f}   forgetting {forgetting}   (lower is better)"
    return "\n".join(["", title, *rows, "", final, ""])


def curvatures(result: dict) -> list[float]:
    """lam c*_k ||mu_k||^2 of each task's penalty along its mu (or first eigenvector); [] without those."""
    return [result["lam"] * fisher["energy"] for fisher in result["fisher"] if "energy" in fisher]


def save_samples(images: Tensor, path: Path) -> None:
    """A picture of (10 * rows, C, H, W) uint8 images, ten in a row, each enlarged to CELL with its margin."""
    scale = (CELL - 2) // images.shape[-1]
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu()
    with whole(path) as temporary:
        torchvision.utils.save_image(images / 255, temporary, nrow=10, pad_value=0.5)


def save_figure(figure: Figure, path: Path) -> None:
    """A PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_fid(result: dict, path: Path) -> None:
    """Each task's FID from the task it was learned in to the last, and their mean, the AFID."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    after = [len(row) - row.count(None) for row in result["fid"]]  # the tasks learned by then
    for k in range(len(result["fid_real"])):
        points = [(j, row[k]) for j, row in zip(after, result["fid"]) if row[k] is not None]
        axes.plot(*zip(*points), "o-", alpha=0.7, label=f"task {k + 1}")
    axes.plot(after, result["afid"], "ks--", label="AFID")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="after task", ylabel=f"FID (features: {result['fid_features']})", ylim=(0, None))
    axes.set_title(f"{result['dataset']}, {result['method']}, seed {result['seed']}")
    figure.legend(loc="outside right center")
    save_figure(figure, path)


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all, a list of numbers a line; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False)
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    with whole(path) as temporary:
        temporary.write_text(text + "\n")


# ----------------------------------------------------------------------------------------------------------
# The report: Table 1, Figure 4 and Figure 5 of the paper from every finished run in a folder.

PUBLISHED = {  # AFID / forgetting in the paper's Table 1, on Inception features; others are not known
    "mnist": {"joint": "2.6 / -", "diag-only": "62.2 / 51.1", "rank1-only": "65.2 / 58.3"}
    | {"gd": "10.1 / 2.3", "diag": "14.3 / 5.2", "rank1": "7.6 / 0.6"},
    "fashion": {"joint": "5.7 / -", "gd": "19.1 / 3.9", "diag": "27.7 / 9.1", "rank1": "15.4 / 0.9"},
    "cifar10": {"joint": "23.3 / -", "gd": "61.2 / 16.6", "diag": "72.6 / 17.9", "rank1": "50.5 / 7.4"},
    "imagenet32": {"joint": "11.7 / -", "diag-only": "86.1 / 34.2", "rank1-only": "74.3 / 41.3"}
    | {"gd": "69.0 / 46.2", "diag": "73.8 / 25.8", "rank1": "48.5 / 15.2"},
}


def mean_and_error(values: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis, the seeds; NaN where one is None; of one seed no error."""
    v = np.asarray(values, dtype=float)
    error = v.std(0, ddof=1) / math.sqrt(len(v)) if len(v) > 1 else np.full_like(v[0], np.nan)
    return v.mean(0), error


def plus_minus(mean: float, error: float) -> str:
    """A mean and its standard error as text; "-" for what is NaN."""
    digits = 2 if abs(mean) < 3 else 1
    text = "-" if math.isnan(mean) else f"{mean:.{digits}f}"
    return text + (f" ± {error:.{digits}f}" if error > 0 else "")


def markdown(rows: list[list[str]]) -> str:
    """A table, its columns as wide as their widest cell; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def gather(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """dataset -> method -> results, one a seed, of every result.json below `folder`; each with its "folder".

    Stops where two do not belong into one table: they differ in a setting other than method, seed and device
    (and, between methods, OF_PENALTY), or in neither method nor seed.
    """
    runs = {}
    for path in sorted(folder.rglob("result.json")):
        result = read_result(path) | {"folder": path.parent}
        methods = runs.setdefault(result["dataset"], {})
        for other in (v for results in methods.values() for v in results):
            pair, a, b = f"{other['folder']} and {path.parent}", other["config"], result["config"]
            if (a["method"], a["seed"]) == (b["method"], b["seed"]):
                stop(f"{pair} are the same method and seed: report only one of them")
            free = {"seed", "device"} | ({"method", *OF_PENALTY} if a["method"] != b["method"] else set())
            for key in sorted((a.keys() & b.keys()) - free):
                if a[key] != b[key]:
                    flag = f"--{key.replace('_', '-')} {a[key]} and {b[key]}"
                    stop(f"{pair} do not belong into one table ({flag}): report their folders apart")
        methods.setdefault(result["method"], []).append(result)
    if not runs:
        stop(f"{folder} holds no finished run (result.json): train some first, as with `make digits`")
    return {name: runs[name] for name in DATASETS if name in runs}


def report(folder: Path) -> None:
    """Print Table 1 of all runs in `folder`, and write table1.md, table1.csv, figure4.png, figure5-*.png."""
    runs, rows, notes = gather(folder), [], []
    for dataset, methods in runs.items():
        config = next(iter(methods.values()))[0]["config"]
        published = PUBLISHED.get(dataset, {})
        for method in METHODS:
            results = methods.get(method, [])
            if not results and method not in TABLE_1:
                continue
            row = {"dataset": dataset, "method": method, "seeds": len(results)}
            numbers = [(result["afid"][-1], result["forgetting"]) for result in results] or [(None, None)]
            for name, *found in zip(("AFID", "forgetting"), *mean_and_error(numbers)):
                row[name], row[f"{name} s.e."] = found
            found = [v for result in results for v in curvatures(result)]
            row["curvature"] = f"{np.mean(found):.2g}" if found else "-"
            row["paper: AFID / forgetting"] = published.get(method, "not known" if published else "-")
            rows.append(row | {"FID features": config["fid_features"]})
        paper = DATASETS[dataset] if published else PAPER
        configs, other = [result["config"] for results in methods.values() for result in results], []
        for key in (*paper, *sorted(OF_PENALTY - paper.keys()), "ema"):
            of = [c for c in configs if key != "lam" or METHODS[c["method"]].penalty]
            if values := {str(c.get(key, paper.get(key))) for c in of} - {str(paper.get(key))}:
                usual = paper.get(key) or ("all" if key == "fisher_samples" else "none")
                other.append(f"{key} {', '.join(sorted(values))} (paper {usual})")
        setting = f"not the paper's setting: {', '.join(other)}" if other else "the paper's setting"
        notes.append(f"{dataset}: FID on features of {config['fid_features']}; {setting}.")

    if absent := [dataset for dataset in PUBLISHED if dataset not in runs]:
        notes.append(f"missing, no finished run: {', '.join(absent)}.")

    def cell(row: dict, name: str) -> str:  # a standard error stands behind its mean
        if not isinstance(row[name], float):
            return str(row[name])
        return plus_minus(row[name], row[f"{name} s.e."]) if row["seeds"] else "missing"

    columns = [name for name in rows[0] if not name.endswith("s.e.")]
    lines = markdown([columns, *([cell(row, name) for name in columns] for row in rows)])
    about = "Mean ± standard error over the seeds; lower is better. Curvature: mean lambda c* ||mu||^2."
    text = "\n".join([lines, "", about, *(f"- {note}" for note in notes), ""])
    print(text)
    with whole(folder / "table1.md") as temporary:
        temporary.write_text(text)
    with whole(folder / "table1.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot_afid(runs, folder / "figure4.png")
    for dataset, methods in runs.items():
        plot_samples(dataset, methods, folder / f"figure5-{dataset}.png")
    print(f"In {folder}: table1.md, table1.csv, figure4.png, figure5-<dataset>.png")


def plot_afid(runs: dict, path: Path) -> None:
    """Figure 4: AFID after each task, a panel a dataset, a line a method, bands of one standard error."""
    figure = Figure(figsize=(1 + 5 * len(runs), 4), layout="constrained")
    for axes, (dataset, methods) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items()):
        for i, method in enumerate(METHODS):  # the same colour in every panel
            if method not in methods:
                continue
            results = methods[method]
            mean, error = mean_and_error([result["afid"] for result in results])
            after = np.arange(1, len(results[0]["fid_real"]) + 1)
            if METHODS[method].joint:  # one number, of no task
                mean, error = np.repeat(mean, len(after)), np.repeat(error, len(after))
            style = {"color": f"C{i}", "ls": "--" if METHODS[method].joint else "-"}
            axes.plot(after, mean, **style, label=f"{method} ({len(results)})")
            axes.fill_between(after, mean - error, mean + error, color=f"C{i}", alpha=0.2, lw=0)
        axes.set(xlabel="after task", ylabel=f"AFID (features: {results[0]['fid_features']})", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axes.grid(alpha=0.3)
        axes.legend(title=f"{dataset} (seeds)", fontsize="small")
    save_figure(figure, path)


def plot_samples(dataset: str, methods: dict, path: Path) -> None:
    """Figure 5: five samples of each of the first two classes, a row a method, a column a task.

    Cut out of the runs' samples-task*.png, of one seed: every picture there starts from the same noise.
    """
    names = [method for method in METHODS if method in methods]
    seed = min(result["seed"] for results in methods.values() for result in results)
    tasks = len(methods[names[0]][0]["fid_real"])
    shown = sorted({round(k) for k in np.linspace(1, tasks, min(tasks, 5))})
    figure = Figure(figsize=(0.6 + 2.2 * len(shown), 0.4 + 0.95 * len(names)), layout="constrained")
    for row, method in zip(figure.subplots(len(names), len(shown), squeeze=False), names):
        row[0].set_ylabel(method)
        for axes, k in zip(row, shown):
            axes.set(xticks=[], yticks=[], title=f"after task {k}" if method == names[0] else "")
            axes.spines[:].set_visible(False)
            for result in methods[method]:
                picture = result["folder"] / f"samples-task{k}.png"
                if result["seed"] == seed and picture.exists():
                    pixels = torchvision.io.decode_image(str(picture)).permute(1, 2, 0)
                    axes.imshow(pixels[: 2 * CELL + 2, : 5 * CELL + 2])
                    break
            else:
                if k == tasks or not METHODS[method].joint:
                    axes.text(0.5, 0.5, "missing", ha="center", va="center", transform=axes.transAxes)
    figure.suptitle(f"{dataset}, seed {seed}")
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------
# What the paper leaves open: runs that differ in a setting, side by side.

MEASURES = ("AFID", "forgetting", "FID of a task just learned", "AFID / gd's")  # a panel each
ALSO = ("curvature, task 1", "train s", "sample s", "fisher s", "peak MB")  # in the table only


def measure(run: dict, gd: dict | None) -> list[float | None]:
    """MEASURES and ALSO of a run, None where it has none; gd: the GD run of its seed and settings, if any."""
    learned = None if run["forgetting"] is None else float(np.mean(np.diag(run["fid"])))
    ratio = run["afid"][-1] / gd["afid"][-1] if gd else None
    seconds = [run["seconds"].get(part, 0.0) for part in ("train", "sample", "fisher")]
    curvature = next(iter(curvatures(run)), None)
    return [run["afid"][-1], run["forgetting"], learned, ratio, curvature, *seconds, run.get("peak_mb")]


def compare(folders: list[Path], over: str, to: Path) -> None:
    """The runs' MEASURES over a setting, mean and standard error over the seeds: printed, to.png and to.json.

    A line for each method, and for each value of another setting in which runs of one method differ; dashed
    if the method does not have the setting `over`. Given lambda, the curvature differs from seed to seed, and
    the other way round: a point stands at the mean over its seeds, of the first task's curvature.
    """
    settings = sorted(settings_of(parse_args([])).keys() - {"seed", "device"})
    if over not in settings:
        stop(f"--over {over} is not a setting: choose from {', '.join(settings)}")
    if absent := [str(folder) for folder in folders if not (folder / "result.json").is_file()]:
        stop(f"{', '.join(absent)} holds no finished run (result.json): train it first, or leave it out")
    runs = [read_result(folder / "result.json") for folder in folders]
    strength = ("lam", "curvature")

    def value(run: dict, name: str) -> float | str | None:
        found = run["config"].get(name)
        return str(found) if isinstance(found, list) else found

    def differ(name: str) -> bool:
        return any(len({value(r, name) for r in runs if r["method"] == m}) > 1 for m in METHODS)

    def apart_from_penalty(run: dict) -> tuple:
        others = (n for n in settings if n != "method" and n not in OF_PENALTY)
        return run["seed"], *(value(run, n) for n in others)

    several = [n for n in settings if differ(n) and n != over and not (n in strength and over in strength)]
    if "dataset" in several:  # then everything differs: the network's size says enough
        several = [n for n in several if n in ("dataset", "channels")]
    gd = {apart_from_penalty(run): run for run in runs if run["method"] == "gd"}
    lines = {}
    for run in sorted(runs, key=lambda run: [*METHODS].index(run["method"])):
        other = [f"{n} {value(run, n)}" for n in several if value(run, n) is not None]
        name = ", ".join(([] if over == "method" else [run["method"]]) + other) or "all"
        at = tuple(value(run, n) for n in strength) if over in strength else value(run, over)
        lines.setdefault(name, {}).setdefault(at, []).append(run)
        run |= zip(MEASURES + ALSO, measure(run, gd.get(apart_from_penalty(run))))
    for name, points in lines.items():
        for found in points.values():
            if len({run["seed"] for run in found}) < len(found):
                stop(f"{name}: two of these runs have the same seed and differ in nothing: name only one")
        if over in strength:
            key = "lam" if over == "lam" else "curvature, task 1"
            means = [float(np.mean([run[key] or 0.0 for run in found])) for found in points.values()]
            if len({*means}) < len(means):
                stop(f"{name}: several of these runs have no {over} to be put over: leave them out")
            lines[name] = dict(zip(means, points.values()))

    def summary(values: list) -> dict:
        mean, error = (None if math.isnan(v) else float(v) for v in mean_and_error(values))
        return {"mean": mean, "error": error, "each": values}

    rows, text = [], [["line", over, "seeds", *MEASURES, *ALSO]]
    for name, points in lines.items():
        for at, found in points.items():
            values = {key: [run[key] for run in found] for key in MEASURES + ALSO}
            rows.append({"line": name, over: at, "seeds": [run["seed"] for run in found]})
            rows[-1] |= {key: summary(v) for key, v in values.items()}
            cells = [plus_minus(*mean_and_error(v)) for v in values.values()]
            text.append(
                [name, str(at) if isinstance(at, str | bool | None) else f"{at:g}", str(len(found)), *cells]
            )
    print(markdown(text))
    write_json(Path(f"{to}.json"), {"over": over, "rows": rows})
    plot_lines(lines, over, Path(f"{to}.png"))
    print(f"In {to}.png, {to}.json")


def plot_lines(lines: dict[str, dict], over: str, path: Path) -> None:
    """A panel for each of MEASURES in which runs differ; lines[name][value] are the runs at that value."""
    runs = [run for points in lines.values() for found in points.values() for run in found]
    shown = [key for key in MEASURES if len({run[key] for run in runs}) > 1] or [MEASURES[0]]
    values = list(dict.fromkeys(v for points in lines.values() for v in points))
    numeric = all(isinstance(v, int | float) for v in values)
    place = {v: v if numeric else i for i, v in enumerate(values)}
    positive = [v for v in values if numeric and v > 0]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes, key in zip(panels, shown):
        for i, (name, points) in enumerate(lines.items()):
            at = sorted(points, key=place.get)
            found = [mean_and_error([run[key] for run in points[v]]) for v in at]
            mean, error = np.array(found).T
            error = np.nan_to_num(error)
            if over in OF_PENALTY and METHODS[points[at[0]][0]["method"]].penalty is None:
                axes.axhline(mean[0], color=f"C{i}", ls="--", label=name)
                axes.axhspan(mean[0] - error[0], mean[0] + error[0], color=f"C{i}", alpha=0.1, lw=0)
            else:
                style = {"fmt": "o-" if numeric else "o", "capsize": 3, "alpha": 0.8}
                shift = 0 if numeric else 0.08 * (i - (len(lines) - 1) / 2)  # beside each other
                axes.errorbar([place[v] + shift for v in at], mean, error, color=f"C{i}", label=name, **style)
        if numeric and max(positive, default=1) >= 10 * min(positive, default=1):
            axes.set_xscale("symlog", linthresh=min(positive)) if 0 in values else axes.set_xscale("log")
        elif not numeric:
            axes.set_xticks([*place.values()], [str(v) for v in place])
            axes.margins(x=0.3 / len(values) + 0.05)
        axes.set(xlabel=over, ylabel=key)
        low, high = axes.dataLim.intervaly
        if low > 0 and high > 5 * low:
            axes.set_yscale("log")
            ticks = LogLocator(subs=(1, 2, 5))
            axes.yaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter="")
        axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    seeds = sorted({run["seed"] for run in runs})
    features = ", ".join(sorted({run["fid_features"] for run in runs}))
    figure.suptitle(f"seeds {seeds}, mean and standard error; FID features: {features}", fontsize="medium")
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------
# The paper's evidence that F has rank 1: Figures 1 to 3, and a VAE, whose F should not. Each function gives
# the numbers, which become the JSON, and the picture. `draws(t, end)`: samples at timesteps t..end-1, the
# same images with the same noise for each t.

TIMES = (*range(0, NUM_STEPS, 50), NUM_STEPS - 1)
EDGES = (0, *((a + b) / 2 for a, b in pairwise(TIMES)), NUM_STEPS)  # of a heat map's columns
VAE_STEPS = (0, 30, 100, 300, 1000, 3000)  # training steps after which its Fisher is looked at
PUBLISHED_SHARE = {"VAE, KL x 1": 0.50, "VAE, KL x 0.001": 0.85, "DDPM": 0.99}


@torch.no_grad()
def figure_1(model: nn.Module, draws: Callable, data: Data) -> tuple[dict, Figure]:
    """MSE(x_t, sqrt(1 - abar_t) eps_hat), and where Proposition 1 has it.

    Tweedie: for the best denoiser, x_t - sqrt(1 - abar_t) eps_hat = sqrt(abar_t) E[x_0 | x_t, y]. At high
    noise that expectation is the class's mean image, at low noise x_0 itself: the MSE lies between
    abar_t E[E[x_0 | y]^2] and abar_t E[x_0^2], means over pixels, and vanishes with abar_t.
    """
    abar = alphas_cumprod(torch.device("cpu"))[[*TIMES]]
    mean_image = any_image = 0.0  # E[E[x_0 | y]^2] and E[x_0^2]
    for c in data.y.unique():
        images = to_float(data.x[data.y == c])
        mean_image += float(images.mean(0).square().mean()) * len(images) / len(data.y)
        any_image += float(images.square().mean()) * len(images) / len(data.y)
    limits = {"high noise": (abar * mean_image).tolist(), "low noise": (abar * any_image).tolist()}
    found = {"t": [*TIMES], "mse": []} | limits
    for t, a in zip(TIMES, abar):
        errors = []
        for x0, ts, eps, y in draws(t, t + 1):
            x_t = add_noise(x0, ts, eps)
            errors.append((x_t - (1 - a).sqrt() * model(x_t, ts, y)).square().flatten(1).mean(1))
        found["mse"].append(float(torch.cat(errors).mean()))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    measured = r"measured: MSE($x_t$, $\sqrt{1-\bar\alpha_t}\,\hat\epsilon$)"
    axes.plot(TIMES, found["mse"], "o-", ms=4, label=measured)
    axes.plot(TIMES, found["high noise"], "--", label=r"Prop. 1, high noise: $\bar\alpha_t\,E[E[x_0|y]^2]$")
    axes.plot(TIMES, found["low noise"], ":", label=r"low noise: $\bar\alpha_t\,E[x_0^2]$")
    axes.set(xlabel="timestep t", ylabel="MSE", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return found, figure


def geometry(model, draws: Iterable[tuple], loss: Callable = losses_at) -> tuple[dict, Tensor, Tensor]:
    """What N single gradients g_i (N, D) say about F = E[g g^T]; mu (D,); and all |cos(g_i, mu)| (N,).

    No D x D matrix is made. error: ||F - approximation|| / ||F||, Frobenius. eigenvalues: the first five.
    mu_noise: what ||mu|| would be if the gradients had no mean. cos_top: mean |cos(g_i, top eigenvector)|.
    """
    G = torch.cat([*gradients(model, draws, loss)])
    values, (top,) = eigenpairs(G, 1)
    mu = G.mean(0)
    norm, along, lengths = float(mu.norm()), G @ mu, G.norm(dim=1)  # (N,) g_i^T mu and ||g_i||
    mu_F_mu = float(along.square().mean())
    diagonal = G.norm(dim=0).square() / len(G)
    F_squared, c_star = float(values.square().sum()), mu_F_mu / norm**4
    squared = {  # ||F - c mu mu^T||^2 = ||F||^2 - 2 c mu^T F mu + c^2 ||mu||^4
        "diagonal": F_squared - float(diagonal.square().sum()),
        "mu mu^T": F_squared - 2 * mu_F_mu + norm**4,
        "c* mu mu^T": F_squared - mu_F_mu**2 / norm**4,
        "best of rank 1": float(values[1:].square().sum()),
    }
    found = {
        "c_star": c_star,
        "mu_norm": norm,
        "mu_noise": math.sqrt(float(values.sum()) / len(G)),
        "energy": c_star * norm**2,
        "trace": float(values.sum()),
        "eigenvalues": values[:5].tolist(),
        "top_share": float(values[0] / values.sum()),
        "cos_mu_top": abs(float(top @ mu)) / norm,
        "error": {name: math.sqrt(max(v, 0) / F_squared) for name, v in squared.items()},
        "cos_top": float(((G @ top).abs() / lengths).mean()),
    }
    return found, mu, along.abs() / (norm * lengths)


def figure_2(model: nn.Module, draws: Callable, data: Data) -> tuple[dict, Figure]:
    """|cos(g_i, mu_t)|, samples x timesteps, and its mean above: also for F_t's top eigenvector."""
    steps = tqdm(TIMES, desc="gradients", unit="timestep", **BAR)
    at, _, cos = zip(*(geometry(model, draws(t, t + 1)) for t in steps))
    cos = torch.stack(cos, 1).cpu().numpy()  # (samples, timesteps)
    found = {"t": [*TIMES], "mean": cos.mean(0).tolist(), "mean_top": [v["cos_top"] for v in at]}
    found["cos"] = cos.round(4).astype(float).T.tolist()
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    above, axes = figure.subplots(2, sharex=True, height_ratios=(1, 2.5))
    above.plot(TIMES, found["mean"], "o-", ms=4, label=r"$\mu_t$")
    above.plot(TIMES, found["mean_top"], "s--", ms=3, label=r"top eigenvector of $F_t$")
    above.axhline(math.sqrt(1 / len(cos)), color="grey", ls=":", label="gradients at random")
    above.set(ylim=(0, 1), ylabel=r"mean $|\cos(g_i, \cdot)|$")
    above.grid(alpha=0.3)
    above.legend(fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    mesh = axes.pcolormesh(EDGES, range(len(cos) + 1), cos, vmin=0, vmax=1, rasterized=True)
    axes.set(xlabel="timestep t", ylabel=f"{len(cos)} samples")
    figure.colorbar(mesh, ax=axes, label=r"$|\cos(g_i, \mu_t)|$")
    return found, figure


def figure_3(model: nn.Module, draws: Callable, data: Data) -> tuple[dict, Figure]:
    """(a) pairwise cosine of mu_t, (b) F_t's top 5 eigenvalues, (c) lambda_2 / lambda_1, (d) the errors."""
    spans = [(t, t + 1) for t in TIMES] + [(0, NUM_STEPS)]
    spans = tqdm(spans, desc="gradients", unit="timestep", **BAR)
    found, mus, _ = zip(*(geometry(model, draws(*span)) for span in spans))
    found = {"t": [*TIMES], "at": found[:-1], "all timesteps": found[-1]}
    mus = F.normalize(torch.stack(mus[:-1]))  # (timesteps, D)
    found["cos_mu"] = (mus @ mus.T).tolist()
    values = np.array([at["eigenvalues"] for at in found["at"]])  # (timesteps, 5)
    found["ratio"] = (values[:, 1] / values[:, 0]).tolist()

    figure = Figure(figsize=(11, 8), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    mesh = a.pcolormesh(EDGES, EDGES, np.array(found["cos_mu"]), vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(mesh, ax=a)
    a.set(title=r"(a) $\cos(\mu_s, \mu_t)$", xlabel="timestep", ylabel="timestep", aspect="equal")
    for j in range(5):
        b.plot(TIMES, values[:, j], "o-", ms=3, label=rf"$\lambda_{j + 1}$")
    b.set(title="(b) largest eigenvalues of $F_t$", xlabel="timestep", yscale="log")
    c.plot(TIMES, found["ratio"], "o-", ms=4, label="measured")
    c.plot(700, 0.022, "k*", ms=10, label="paper: 0.022 at t = 700")
    c.set(title=r"(c) $\lambda_2 / \lambda_1$", xlabel="timestep", ylim=(0, 1))
    for name in found["at"][0]["error"]:
        d.plot(TIMES, [at["error"][name] for at in found["at"]], "o-", ms=4, label=name)
    d.set(title=r"(d) $\|F_t - \mathrm{approximation}\| / \|F_t\|$", xlabel="timestep", ylim=(0, 1.05))
    for axes in (b, c, d):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return found, figure


class VAE(nn.Module):
    """A variational autoencoder of two hidden layers, forward(x, eps) -> its image, mean, log variance.

    x (B, pixels) in [-1, 1]; eps (B, 8) the noise of the latent vector (arXiv 1312.6114).
    """

    latent = 8

    def __init__(self, pixels: int, hidden: int = 128):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(pixels, hidden), nn.SiLU(), nn.Linear(hidden, 2 * self.latent))
        self.decode = nn.Sequential(nn.Linear(self.latent, hidden), nn.SiLU(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        return self.decode(mean + (log_var / 2).exp() * eps), mean, log_var


def vae_losses(kl_weight: float, vae: VAE, draw: Iterable[Tensor], theta: dict[str, Tensor]) -> Tensor:
    """Per sample (B,): squared error, mean over pixels, + weight x KL divergence from N(0, 1), sum."""
    x, eps = draw
    image, mean, log_var = functional_call(vae, theta, (x, eps))
    kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
    return (image - x).square().mean(1) + kl_weight * kl


def vae_draw(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flat images (B, pixels) in [-1, 1] and noise for their latent vectors, on the generator's device."""
    x = to_float(images.to(generator.device)).flatten(1)
    return x, torch.randn(len(x), VAE.latent, generator=generator, device=x.device)


def vae_control(model: nn.Module, draws: Callable, data: Data) -> tuple[dict, Figure]:
    """The share of F's trace in its top eigenvalue: of VAEs while they learn, and of the DDPM."""
    found, device = {"steps": [*VAE_STEPS]}, next(model.parameters()).device
    for kl_weight in (1.0, 1e-3):
        generator, at = rng(0, "vae", 0, device), []
        torch.manual_seed(0)
        vae = VAE(data.x[0].numel()).to(device)
        spread = torch.linspace(0, len(data.y) - 1, gradients_that_fit(vae)).long()
        optimizer, loss = torch.optim.Adam(vae.parameters(), lr=1e-3), partial(vae_losses, kl_weight)

        name = f"VAE, KL x {kl_weight:g}"
        for step in tqdm(range(VAE_STEPS[-1] + 1), desc=name, unit="step", leave=False, **BAR):
            if step in VAE_STEPS:
                draw = vae_draw(data.x[spread], generator)
                mse = vae_losses(0.0, vae, draw, dict(vae.named_parameters())).mean().item()
                at.append(geometry(vae, [draw], loss)[0] | {"mse": mse})
            index = torch.randint(len(data.y), (128,), generator=generator, device=device).cpu()
            value = loss(vae, vae_draw(data.x[index], generator), dict(vae.named_parameters())).mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        found[name] = at
    for name, when in {"all t": (0, NUM_STEPS), "t = 100": (100, 101), "t = 700": (700, 701)}.items():
        found[f"DDPM, {name}"] = [geometry(model, draws(*when))[0]]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, at) in enumerate([*found.items()][1:]):
        shares = [v["top_share"] for v in at]
        if len(at) > 1:
            axes.plot(VAE_STEPS, shares, "o-", ms=4, color=f"C{i}", label=name)
        else:
            axes.axhline(shares[0], ls="--", color=f"C{i}", label=f"{name}, trained")
    for (name, share), color in zip(PUBLISHED_SHARE.items(), ("C0", "C1", "k")):
        axes.plot(VAE_STEPS[-1], share, "*", ms=12, color=color, label=f"{name}: paper, about {share:.0%}")
    axes.set(xlabel="the VAE's training steps", ylabel="top eigenvalue's share of F's trace", ylim=(0, 1.05))
    axes.set_xscale("symlog", linthresh=VAE_STEPS[1])
    axes.set_xlim(0, 1.3 * VAE_STEPS[-1])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    return found, figure


FIGURES = {"1": figure_1, "2": figure_2, "3": figure_3, "vae": vae_control}


def paint_figure(cfg: argparse.Namespace, data: Data, device: torch.device) -> None:
    """cfg.figure of the model in cfg.out, to cfg.to .png and .json."""
    if cfg.limit:
        data = limit_classes(data, cfg.limit)
    model = UNet(data.x.shape[1], int(data.y.max()) + 1, cfg.channels, cfg.layers_per_block, cfg.dropout)
    try:
        model.load_state_dict(torch.load(cfg.out / "model.pt", map_location="cpu", weights_only=True))
    except DAMAGED as error:
        broken = f"{cfg.out / 'model.pt'} is missing or damaged ({type(error).__name__})"
        stop(f"{broken}: name another run with --out, or an empty folder, to train one there")
    model = model.to(device).eval()
    n = GRADIENTS if cfg.figure == "1" else gradients_that_fit(model)  # Figure 1 needs no gradients
    x, y = data.x.to(device), data.y.to(device)

    def draws(first: int, end: int) -> Iterator[tuple]:
        return fisher_draws(x, y, n, SAMPLE_BATCH, rng(cfg.seed, "figure", 0, device), (first, end))

    found, figure = FIGURES[cfg.figure](model, draws, data)
    weights = sum(p.numel() for p in model.parameters())
    of = f"{cfg.dataset}, {cfg.method}, seed {cfg.seed}: {weights:,} weights"
    usual = DATASETS[cfg.dataset] | (SMALL_32 if cfg.dataset != "digits" else {})
    usual["lam"] = cfg.lam  # it may be 0, of no penalty
    changed = [f"{key} {getattr(cfg, key)}" for key, value in usual.items() if getattr(cfg, key) != value]
    figure.suptitle(", ".join([of, f"{n} samples a timestep", *changed]), fontsize="medium", wrap=True)
    to = cfg.to or Path("results") / f"figure{cfg.figure}-{cfg.dataset}"
    write_json(Path(f"{to}.json"), {"figure": cfg.figure, "samples": n, "config": settings_of(cfg)} | found)
    save_figure(figure, Path(f"{to}.png"))
    print(f"Of the model in {cfg.out} ({of}): {to}.png, {to}.json")


# ----------------------------------------------------------------------------------------------------------
# Command line.


def number(kind: type, low: float, high: float = 1e12, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number from `low` (itself too, unless only `above` it) to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            bound = "above" if above else "at least"
            raise argparse.ArgumentTypeError(f"must be {bound} {low:g} and at most {high:g}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` fails
    return parse


def channel_list(text: str) -> list[int]:
    """An argparse type: "128,256" -> [128, 256]."""
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise argparse.ArgumentTypeError(f"must be numbers from 1 on, as 32,64, not {text}")
    return [int(c) for c in text.split(",")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings: the dataset's row, and over it what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.epilog = "A setting not given is the dataset's: for all but digits the paper's."
    parser.error = stop
    add, positive = parser.add_argument, number(int, 1)
    add("--dataset", choices=DATASETS, default="digits")
    add("--method", choices=METHODS, help="a row of Table 1, or rank2 .. (default: rank1; for figures joint)")
    add("--small", action="store_true", help="a small network and one epoch a task: under an hour on a CPU")
    add("--lam", type=number(float, 0), help="lambda, the penalty's weight")
    add("--curvature", type=number(float, 0, above=True), help="choose lambda: lambda c* ||mu||^2 of task 1")
    add("--form", choices=("proximal",), help="the penalty as a proximal step after each of Adam's")
    add("--seed", type=number(int, 0), default=0)
    add("--epochs", type=positive, help="epochs a task")
    add("--batch-size", type=positive, help="real images a step; as many replayed ones come on top")
    add("--accumulate", type=positive, default=1, help="turns to take a batch in, where memory is short")
    switch = argparse.BooleanOptionalAction
    add("--bf16", action=switch, help="train and sample in bfloat16 (default: on a GPU)")
    add("--compile", action=switch, help="compile the network, a minute (default: on a GPU)")
    add("--lr", type=number(float, 0, above=True), help="Adam's learning rate")
    add("--lr-decay", choices=("none", "linear"), help="constant, or falling to 0 within each task")
    add("--channels", type=channel_list, help="the UNet's channels at each level, as 128,256,256,256")
    add("--layers-per-block", type=positive, help="residual blocks a level")
    add("--dropout", type=number(float, 0, 0.99), help="in the UNet while it trains")
    add("--replay-per-class", type=positive, help="images of each old class that the teacher paints")
    add("--sample-steps", type=number(int, 1, NUM_STEPS), help="DDIM steps")
    add("--fisher-samples", type=positive, help="samples of a Fisher (default: the task's images, once each)")
    add("--fisher-from", type=number(int, 0, NUM_STEPS - 1), help="smallest timestep of these samples")
    add("--ema", type=number(float, 0, 0.99999), help="the teacher: weights averaged with this decay")
    add("--limit", type=positive, help="a quick look: at most so many images a class, old or new")
    add("--fid", choices=("inception", "classifier"), help="features that the FID is taken on")
    add("--data-dir", type=Path, default=Path("data"), help="where the datasets are, or are downloaded to")
    add("--out", type=Path, help="folder for the results (default: runs/<dataset>/<method>-seed<seed>)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, .. or mps (untested)")
    add("--checkpoint-epochs", type=positive, help="epochs between two checkpoints")
    add("--fresh", action="store_true", help="start over, not go on: gives up the run that is in OUT")
    add("--figure", choices=FIGURES, help="of the model in OUT, which is trained first if it is not there")
    add("--compare", type=Path, nargs="+", metavar="RUN", help="train nothing: plot these runs over OVER")
    add("--over", metavar="SETTING", default="lam", help="as lam, method, replay_per_class, curvature")
    add("--to", type=Path, help="name of a figure's files without .png and .json (default: results/..)")
    add("--report", type=Path, metavar="RUNS", help="train nothing: Table 1, Figures 4 and 5 of all RUNS")
    add("--needs", type=Path, metavar="FILE", help="train nothing: the hours and disk of every run, as JSON")
    cfg = parser.parse_args(argv)
    cfg.method = cfg.method or ("joint" if cfg.figure else "rank1")
    small = (cfg.small or cfg.figure) and cfg.dataset != "digits"
    row = DATASETS[cfg.dataset] | (SMALL_32 if small else {})
    if cfg.limit:
        row["replay_per_class"] = min(cfg.limit, row["replay_per_class"])
    low_rank = METHODS[cfg.method].penalty is LowRankPenalty
    if cfg.curvature and (cfg.lam is not None or not low_rank):
        stop("--curvature chooses lambda for the rank methods: leave out --lam, or --curvature")
    if cfg.ema is not None and not METHODS[cfg.method].replay:
        stop(f"--ema makes a teacher, which --method {cfg.method} does not have: leave it out")
    if cfg.form and not low_rank:
        stop("--form proximal is for the rank methods: leave it out")
    if WORLD != int(os.environ.get("LOCAL_WORLD_SIZE", str(WORLD))):
        stop("several machines are not supported: start torchrun on one, as --nproc_per_node N")
    if WORLD > 1 and (cfg.figure or cfg.needs or cfg.report or cfg.compare):
        stop("torchrun is for training: start --figure, --needs, --report and --compare without it")
    if cfg.curvature or METHODS[cfg.method].penalty is None:
        cfg.lam = 0.0
    for name, value in row.items():
        if getattr(cfg, name, None) is None:
            setattr(cfg, name, value)
    runs = Path("runs-small" if small else "runs")
    cfg.out = cfg.out or runs / cfg.dataset / f"{cfg.method}-seed{cfg.seed}"
    multiple = math.lcm(max(1, cfg.channels[0] // 4), HEAD_CHANNELS)
    if any(c % multiple for c in cfg.channels):
        stop(f"--channels {cfg.channels} must be multiples of {multiple}, for the norm groups and attention")
    return cfg


def find_device(name: str) -> torch.device:
    """--device as a torch.device that works; stops if it does not."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        if device.type == "cuda":
            device = torch.device("cuda", RANK if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        of = f" for process {RANK} of {WORLD}" if WORLD > 1 else ""
        stop(f"--device {name} does not exist here{of}: choose auto, cpu, cuda, cuda:N or mps")
    if WORLD > 1 and name.startswith("cuda:"):
        stop(f"--device {name} is one device for all {WORLD} processes: give --device cuda, one for each")
    if device.type == "mps":
        print("note: --device mps is accepted but untested")
    return device


def prepare(cfg: argparse.Namespace, device: torch.device) -> tuple[Data, Callable[[Tensor], np.ndarray]]:
    """The data, and the features of the FID; cfg.fid_features becomes their name."""
    data = LOADERS[cfg.dataset](cfg.data_dir)
    size, halvings = data.x.shape[-1], len(cfg.channels) - 1
    if size % 2**halvings or size == 2**halvings:  # a group norm needs more than one pixel
        stop(f"--channels: {halvings + 1} levels, each of half the size, do not fit {size}x{size} images")
    if cfg.fid == "inception":
        features, cfg.fid_features = inception_features(device), "inception"
    else:
        features, accuracy = classifier_features(cfg.dataset, data, device)
        cfg.fid_features = f"{cfg.dataset}-classifier"
        print(f"FID features: a classifier of {cfg.dataset}, {accuracy:.1%} right on its test images")
    if cfg.limit:
        data = limit_classes(data, cfg.limit)
        cfg.fid_features += f", limit {cfg.limit}"
    return data, features


def main(argv: list[str] | None = None) -> dict | None:
    """Check everything that can be checked, then run, or go on with a run that was stopped."""
    cfg = parse_args(argv)
    try:
        if cfg.report:
            return report(cfg.report)
        if cfg.compare:
            return compare(cfg.compare, cfg.over, cfg.to or Path("results") / f"compare-{cfg.over}")
        device = find_device(cfg.device)
        cfg.device = device.type
        if WORLD > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            patience = timedelta(days=1)  # rank 0 may have to shrink ImageNet first
            dist.init_process_group(backend, timeout=patience)
            sys.stdout = StringIO() if RANK else sys.stdout  # rank 0 speaks for all
            if device.type == "cpu":  # torchrun gives each process one thread
                torch.set_num_threads(max(1, os.cpu_count() // WORLD))
        if cfg.needs:
            return needs(cfg.needs, device)
        torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32: mu is a mean that all but cancels
        cfg.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out).close()  # not writable? said now, not after loading the data
        finished, path = cfg.out / "result.json", cfg.out / "checkpoint.pt"
        same_for_all(finished.exists())
        if finished.exists() and not cfg.fresh:
            result = read_result(finished)
            if cfg.figure:  # whatever was trained there
                vars(cfg).update(result["config"] | {"device": device.type})
                return paint_figure(cfg, LOADERS[cfg.dataset](cfg.data_dir), device)
            refuse_other(result["config"], cfg, finished)
            print(table(result), f"{finished} is of a finished run (--fresh starts it over)", sep="\n")
            return result
        if not cfg.fresh:
            load_checkpoint(path, cfg)  # refuses one that does not fit, before any work
        if RANK:
            all_sum(torch.zeros(1))  # waits until rank 0 has loaded everything: what it made is there then
        data, features = prepare(cfg, device)
        if not RANK:
            if cfg.fresh:
                finished.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            for unfinished in cfg.out.glob(f"{UNFINISHED}*"):  # what this run was writing when it was killed
                unfinished.unlink()
            all_sum(torch.zeros(1))
        cfg.fresh = False  # an interrupted run goes on without it
        result = run(cfg, data, features, device)
    except KeyboardInterrupt:
        again = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--fresh" or cfg.fresh]
        start = ["torchrun", "--nproc_per_node", str(WORLD)] if WORLD > 1 else [sys.executable]
        command = shlex.join([*start, sys.argv[0], *again])
        if not RANK:
            print(f"\nrank1_ewc: interrupted; this goes on where it stopped: {command}", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        stop(f"{error.filename or cfg.out} cannot be read or written ({error.strerror})")
    except RuntimeError as error:
        if "failed writing" in str(error):  # torch.save's words for a full disk
            stop(f"--out {cfg.out} cannot be written, is the disk full? After that the same command goes on")
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        stop(f"{device} has too little memory: raise --accumulate (now {cfg.accumulate}) or lower --channels")
    print(table(result))
    if cfg.figure:
        return paint_figure(cfg, data, device)
    pictures = "samples-task*.png, checkpoint.pt (which may now be removed)"
    print(f"In {cfg.out}: result.json, fid.png, log.jsonl, model.pt, {pictures}")
    return result


if __name__ == "__main__":
    main()
    if WORLD > 1:
        dist.destroy_process_group()
