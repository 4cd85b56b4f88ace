"""Continual learning of a class-conditional diffusion model with generative distillation and rank-1 EWC.

The paper as one file, read from top to bottom: "Avoid Catastrophic Forgetting with Rank-1 Fisher from
Diffusion Models", Wang, Gupta, Dong, MacLellan, ICLR 2026, arXiv 2509.23593.

    python rank1_ewc.py                                      # 8x8 digits, rank-1 EWC: minutes on a laptop
    python rank1_ewc.py --dataset mnist --method rank1       # the paper's run: a GPU and patience
    torchrun --nproc_per_node 8 rank1_ewc.py --dataset mnist                 # the same run on 8 GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST rank1_ewc.py ..    # on 16
    python rank1_ewc.py --help                               # every setting

Symbols: x0 a clean image in [-1, 1], (B, C, H, W); t a timestep in 0..999, (B,); y a class, (B,); eps
Gaussian noise like x0; abar how much of x0 is left at t; theta all D weights as one vector (D,); theta* the
weights at the end of a task; l the loss of one sample, g = dl/dtheta its gradient; mu = E[g]; c* the
coefficient of F = E[g g^T] on mu mu^T; lam EWC's lambda, the weight of its penalty.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

# cuBLAS reads this when CUDA starts: without it the same seed may give two results on one GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import cleanfid.features
import filelock
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from tqdm import tqdm

# ---- Settings: a row a setting. A dataset's row, below, holds only what differs from the paper's main
# experiments. METHODS, the other table, stands after the functions that its rows name.

NUM_STEPS = 1000  # diffusion timesteps
EVERY_STEP = (0, NUM_STEPS)
Settings = argparse.Namespace


def numbers(text: str) -> list[int]:
    """An argparse type: "32,64" -> [32, 64]."""
    return [int(part) for part in text.split(",")]


COUNT = (1, 10**7)
SETTINGS = {  # name: (the paper's value, type, smallest and largest or choices if any, help)
    "dataset": ("digits", str, None, "what is learned: a row of DATASETS"),
    "method": ("rank1", str, None, "how old classes are kept: a row of METHODS"),
    "seed": (0, int, (0, 2**62), "seed of everything that is drawn at random"),
    "tasks": (5, int, COUNT, "number of tasks: the classes are split among them equally, in label order"),
    "epochs": (200, int, COUNT, "epochs a task"),
    "batch_size": (128, int, COUNT, "real images a step; as many replayed ones come on top"),
    "lr": (2e-4, float, (1e-12, 1e12), "Adam's learning rate, a fresh Adam each task"),
    "lr_decay": ("none", str, ("none", "linear"), "constant, or falling to 0 within each task"),
    "lam": (15000.0, float, (0, 1e30), "EWC's lambda; a smaller network needs a smaller one"),
    "form": ("loss", str, ("loss", "proximal"), "the penalty in the loss, or a step after each of Adam's"),
    "fisher_samples": (10_000, int, COUNT, "samples (image, t, eps) of a task for mu, and as many for c*"),
    "fisher_timesteps": ([*EVERY_STEP], numbers, EVERY_STEP, "the first of their timesteps, and their end"),
    "replay_per_class": (5000, int, COUNT, "images of each old class that the teacher paints"),
    "sample_steps": (50, int, (1, NUM_STEPS), "DDIM steps of an image"),
    "replay_steps": (None, int, (1, NUM_STEPS), "DDIM steps of a replayed image (default: sample-steps)"),
    "ema": (0.0, float, (0, 0.99999), "decay of the average of its weights that a task ends with; 0: none"),
    "channels": ([128, 256, 256, 256], numbers, (1, 4096), "channels of the UNet at each level"),
    "layers_per_block": (2, int, (1, 100), "residual blocks a level"),
    "dropout": (0.0, float, (0, 0.99), "in the UNet while it trains; the paper says 0.1, see README"),
    "limit": (None, int, (2, 10**7), "a quick look: at most so many images a class, and less of all else"),
    "small": (False, bool, None, "a small network and one epoch a task, for 32x32 images on a CPU"),
    "fid": ("inception", str, ("inception", "classifier"), "features that the FID is taken on"),
    "accumulate": (1, int, COUNT, "parts that a batch is computed in: more of them need less memory"),
    "bf16": (None, bool, None, "train and sample in bfloat16 (default: on GPUs from Ampere on)"),
    "cuda_graph": (None, bool, None, "start a step's kernels all at once (default: on GPUs with CUDA)"),
    "device": ("auto", str, None, "auto, cpu, cuda, cuda:1, .. or mps"),
    "data_dir": (Path("data"), Path, None, "where the datasets are, or are downloaded to"),
    "out": (None, Path, None, "folder for the results (default: one in runs/, with --small in runs-small/)"),
    "fresh": (False, bool, None, "start over, not go on: gives up the run that is in OUT"),
}
DIGITS = {"epochs": 270, "batch_size": 64, "lr": 4e-3, "lr_decay": "linear", "lam": 10.0, "fid": "classifier"}
DIGITS |= {"channels": [16, 32], "layers_per_block": 1, "replay_per_class": 200, "sample_steps": 20}
DIGITS |= {"fisher_samples": 4000}  # 20 of each training image: mu from 200 would be mostly noise
SMALL = DIGITS | {"epochs": 1, "batch_size": 16, "sample_steps": 10, "channels": [16, 32, 32, 32]}
IMAGENET = {"tasks": 20, "epochs": 100, "replay_per_class": 1300}
DATASETS = {"digits": DIGITS, "mnist": {}, "fashion": {}, "cifar10": {}, "imagenet32": IMAGENET}
# Settings that may differ when a stopped run is continued: they change rounding and dropout's draws alone.
MAY_CHANGE = ("accumulate", "cuda_graph", "data_dir", "out", "fresh", "small")

SAMPLE_BATCH = {"cpu": 200, "mps": 200, "cuda": 1000}  # painted together; on a CPU 100 and 800 are slower
FISHER_BATCH = 128  # samples of a Fisher computed together
GRADIENTS = 1024  # so many gradients of single samples are kept at once, for F's eigenvectors
GRADIENT_FLOATS = 400_000_000  # and so many numbers in them at most: 1.6 GB, 10 gradients of 37M weights
DAMAGED = Exception  # a file that is cut short, or something else than its name says, may raise anything
CHECKPOINT_SECONDS = 60  # a checkpoint is written at the first end of an epoch after so long

SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # says which runs come from one code

# torchrun starts WORLD processes of this script, on one machine or several, and numbers them. (A cluster may
# set WORLD_SIZE too, but no LOCAL_RANK: then this process is the only one.)
TORCHRUN = dist.is_torchelastic_launched() and "LOCAL_RANK" in os.environ
ENV = os.environ if TORCHRUN else {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
WORLD, RANK, LOCAL_RANK = int(ENV["WORLD_SIZE"]), int(ENV["RANK"]), int(ENV["LOCAL_RANK"])
# stdout or stderr may be closed, or take ASCII alone: then text is lost, but the run goes on.
sys.stdout, sys.stderr = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
BAR = {"mininterval": 0.5 if sys.stderr.isatty() else 10, "dynamic_ncols": True, "disable": RANK > 0}


def stop(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    print(f"rank1_ewc: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def my_share(items: Iterable) -> Iterator:
    """The items that this process computes: every WORLD-th; all of them, if it is the only one."""
    return islice(items, RANK, None, WORLD)


def all_sum(v: Tensor) -> Tensor:
    """v summed over the processes of torchrun, in place; of a single process v as it is."""
    if WORLD > 1:
        dist.all_reduce(v)
    return v


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of these tensors as one vector, whatever their memory format; of a model's weights (D,)."""
    return torch.cat([v.reshape(-1) for v in tensors])


def shaped(vector: Tensor, like: Collection[Tensor]) -> list[Tensor]:
    """The way back: views of a vector in the shapes of these tensors."""
    return [part.view_as(v) for part, v in zip(vector.split([v.numel() for v in like]), like)]


@torch.no_grad()
def overwrite(weights: Collection[nn.Parameter], vector: Tensor) -> None:
    """Copy a vector into the weights, in place: a recorded step reads them where they lie."""
    for p, values in zip(weights, shaped(vector, weights)):
        p.copy_(values)


def rng(device: torch.device, *purpose: int | str) -> torch.Generator:
    """A generator of its own for each purpose: one draw more in one place changes no other place."""
    digest = hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour that then takes the name: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".rank1_ewc-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(None, "no space left?", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- Data. Held as uint8, class after class; a task's training images lie on the device while it is learned,
# and are turned to [-1, 1] a batch at a time.


class Data(NamedTuple):
    """Images (N, C, H, W) uint8 in 0..255 and labels (N,) int64, to train and to test; load_data sorts."""

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


def load_digits(_: Path) -> Data:
    """scikit-learn's 1,797 digits, 1x8x8: 800 for testing, drawn class by class with a seed that is fixed."""
    digits = sklearn.datasets.load_digits()
    x = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]  # (1797, 1, 8, 8)
    split = {"test_size": 800, "stratify": digits.target, "random_state": 0}
    x, test_x, y, test_y = sklearn.model_selection.train_test_split(x, digits.target, **split)
    return Data(*map(torch.from_numpy, (x, y, test_x, test_y)))


def load_torchvision(dataset: type, data_dir: Path) -> Data:
    """A dataset of torchvision's, 32x32: MNIST's 28x28 are padded by 2. Downloads what is missing."""
    train, test = (dataset(data_dir, train=train, download=True) for train in (True, False))
    x, y, test_x, test_y = map(torch.as_tensor, (train.data, train.targets, test.data, test.targets))
    if x.ndim == 3:  # (N, 28, 28)
        x, test_x = (F.pad(images, (2, 2, 2, 2))[..., None] for images in (x, test_x))
    return Data(x.permute(0, 3, 1, 2), y, test_x.permute(0, 3, 1, 2), test_y)


def load_imagenet32(data_dir: Path) -> Data:
    """The downsampled ImageNet (arXiv 1707.08819), 3x32x32, from its npz files: 12 GB of host memory."""
    parts = []
    for name in [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]:
        try:
            with np.load(data_dir / "imagenet32" / name, allow_pickle=False) as file:
                x, y = file["data"], file["labels"].astype(np.int64)  # in channel, row, column order
            if x.dtype != np.uint8 or x.shape != (len(y), 3072):
                raise ValueError(f"data is {x.dtype} {x.shape}, not uint8 ({len(y)}, 3072)")
        except DAMAGED as error:
            raise ValueError(f"{name}: {error}") from error
        parts.append((torch.from_numpy(x).view(-1, 3, 32, 32), torch.from_numpy(y) - 1))  # labels from 1 on
    x, y = map(torch.cat, zip(*parts[:-1]))
    return Data(x, y, *parts[-1])


IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte (four files, plain or .gz)"
LOADERS = {  # name: (data_dir -> Data, the files that it reads there)
    "digits": (load_digits, ""),
    "mnist": (partial(load_torchvision, torchvision.datasets.MNIST), f"MNIST/raw/{IDX}"),
    "fashion": (partial(load_torchvision, torchvision.datasets.FashionMNIST), f"FashionMNIST/raw/{IDX}"),
    # CIFAR-10's files are pickles: torchvision reads only those with the right MD5.
    "cifar10": (partial(load_torchvision, torchvision.datasets.CIFAR10), "cifar-10-python.tar.gz"),
    "imagenet32": (load_imagenet32, "imagenet32/{train_data_batch_1..10,val_data}.npz"),
}


def load_data(name: str, data_dir: Path) -> Data:
    """A dataset, class after class. Stops if a class lacks images to learn from, or to test with."""
    load, files = LOADERS[name]
    try:
        data = load(data_dir)
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {error}"
        stop(f"{name} is missing or damaged ({reason}): get {data_dir / files}, or name another --data-dir")
    every_class = torch.arange(int(data.y.max()) + 1)
    for y in (data.y, data.test_y):
        classes, counts = y.unique(return_counts=True)
        if not classes.equal(every_class) or counts.min() < 2:
            stop(f"{name} in {data_dir} lacks training or test images of some class: put the whole set there")
    train, test = data.y.argsort(stable=True), data.test_y.argsort(stable=True)
    return Data(data.x[train], data.y[train], data.test_x[test], data.test_y[test])


def limit_classes(data: Data, n: int) -> Data:
    """The first n images of each class, of those to train and of those to test, of data sorted by class."""
    train, test = (torch.arange(len(y)) - torch.searchsorted(y, y) < n for y in (data.y, data.test_y))
    return Data(data.x[train], data.y[train], data.test_x[test], data.test_y[test])


def split_tasks(data: Data, tasks: int) -> list[Data]:
    """The classes in label order, equally many a task; views, no copies, of data sorted by class."""
    classes = int(data.y.max()) + 1
    if classes % tasks:
        stop(f"--tasks {tasks}: {classes} classes cannot be shared out equally, choose a divisor")
    n, m = (y.bincount().view(tasks, -1).sum(1).tolist() for y in (data.y, data.test_y))  # of each task
    return [*map(Data, data.x.split(n), data.y.split(n), data.test_x.split(m), data.test_y.split(m))]


# ---- Denoiser: eps_theta(x_t, t, y). The UNet of DDPM (arXiv 2006.11239) as diffusers' UNet2DModel builds it
# in the paper's configuration; the parameters carry the same names, so a state_dict fits both ways.

HEAD_CHANNELS = 8


class GroupNorm(nn.GroupNorm):
    """A group norm in its input's precision: on a GPU autocast would go to float32 and back."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Resnet(nn.Module):
    """Residual block, the time and class embedding added in its middle; `resample` acts on both its paths."""

    def __init__(self, c_in, c_out, temb_channels, groups, dropout, resample=None):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1 = GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, c_out)
        self.norm2 = GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(self.resample(x)) + h


class Attention(nn.Module):
    """Self-attention between all pixels, in heads of HEAD_CHANNELS channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = (self.to_q(h), self.to_k(h), self.to_v(h))
        q, k, v = (v.unflatten(2, (-1, HEAD_CHANNELS)).transpose(1, 2) for v in qkv)  # (B, heads, HW, 8)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(h.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


class Resample(nn.Module):
    """A 3x3 convolution that halves the resolution (stride 2), or follows a doubling of it."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2) if self.up else x)


class UNet(nn.Module):
    """Class-conditional denoiser, forward(x_t, t, y) -> eps. At its defaults the paper's network.

    x_t, eps: (B, in_channels, H, W), H, W multiples of 2^(levels - 1); t: (B,) int in 0..999; y: (B,) int in
    0..num_classes-1. Attention is in the middle and at the third level (8x8 of 32x32). 37,191,681 parameters
    for 1 channel and 10 classes. Raises ValueError if `channels` do not fit.
    """

    def __init__(
        self, in_channels, num_classes, channels=(128, 256, 256, 256), layers_per_block=2, dropout=0.0
    ):
        super().__init__()
        temb_channels = 4 * channels[0]
        groups = max(8, channels[0] // 4)  # 32 of the paper's 128 channels, 8 of its small network's 16
        multiple = math.lcm(groups, HEAD_CHANNELS)
        if any(c % multiple for c in channels):
            raise ValueError(f"channels {channels} must be multiples of {multiple}, for norms and attention")
        resnet = partial(Resnet, temb_channels=temb_channels, groups=groups, dropout=dropout)

        def stage(level, c, inputs):  # a level's residual blocks, and attention (or nothing) after each
            resnets = nn.ModuleList([resnet(c_in, c) for c_in in inputs])
            attentions = [Attention(c, groups) if level == 2 else nn.Identity() for _ in inputs]
            return nn.ModuleDict({"resnets": resnets, "attentions": nn.ModuleList(attentions)})

        def resample(level, c, up):  # at the level with attention it is a residual block
            change = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2)
            return resnet(c, c, resample=change) if level == 2 else Resample(c, up)

        self.num_frequencies = channels[0] // 2
        linear_1, linear_2 = nn.Linear(channels[0], temb_channels), nn.Linear(temb_channels, temb_channels)
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        self.class_embedding = nn.Embedding(num_classes, temb_channels)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]
        for level, c in enumerate(channels):
            inputs = [skips[-1]] + [c] * (layers_per_block - 1)
            self.down_blocks.append(stage(level, c, inputs))
            down = [resample(level, c, up=False)] if level + 1 < len(channels) else []
            self.down_blocks[-1]["downsamplers"] = nn.ModuleList(down)
            skips += [c] * (layers_per_block + len(down))
        below = channels[-1]
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList([resnet(below, below) for _ in range(2)])})
        self.mid_block["attentions"] = nn.ModuleList([Attention(below, groups)])
        for level, c in reversed(list(enumerate(channels))):
            inputs = [c_in + skips.pop() for c_in in [below] + [c] * layers_per_block]
            self.up_blocks.append(stage(level, c, inputs))
            up = [resample(level, c, up=True)] if level > 0 else []
            self.up_blocks[-1]["upsamplers"] = nn.ModuleList(up)
            below = c
        self.conv_norm_out = GroupNorm(groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        k = torch.arange(self.num_frequencies, device=x.device)
        angle = t[:, None] * torch.exp(-math.log(10000) * k / self.num_frequencies)
        temb = self.time_embedding["linear_1"](torch.cat([angle.cos(), angle.sin()], 1))
        temb = self.time_embedding["linear_2"](F.silu(temb)) + self.class_embedding(y)  # (B, 4 channels[0])
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for resnet, attention in zip(level["resnets"], level["attentions"]):
                x = attention(resnet(x, temb))
                skips.append(x)
            for down in level["downsamplers"]:
                x = down(x, temb)
                skips.append(x)
        first, second = self.mid_block["resnets"]
        x = second(self.mid_block["attentions"][0](first(x, temb)), temb)
        for level in self.up_blocks:
            for resnet, attention in zip(level["resnets"], level["attentions"]):
                x = attention(resnet(torch.cat([x, skips.pop()], 1), temb))
            for up in level["upsamplers"]:
                x = up(x, temb)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ---- Diffusion: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, trained to find eps (DDPM, arXiv 2006.11239),
# sampled in few steps without noise (DDIM, arXiv 2010.02502).


@cache
def alphas_cumprod(device: torch.device) -> Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), with beta linear from 1e-4 to 0.02. (1000,) float32."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_STEPS), 0).to(device)


def add_noise(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. x0, eps (B, C, H, W), t (B,) -> (B, C, H, W)."""
    abar = alphas_cumprod(x0.device)[t][:, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def draw_noise(x0: Tensor, generator: torch.Generator, timesteps=EVERY_STEP) -> tuple[Tensor, Tensor]:
    """t ~ U{0..999} (B,), or from the first of `timesteps` to before the second; eps ~ N(0, 1) like x0."""
    t = torch.randint(*timesteps, (len(x0),), generator=generator, device=x0.device)
    return t, torch.randn(x0.shape, generator=generator, device=x0.device)


def per_sample_loss(predict: Callable, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor) -> Tensor:
    """l_i = mean over pixels of (eps_theta(x_t, t, y) - eps)^2. -> (B,)."""
    return (predict(add_noise(x0, t, eps), t, y) - eps).square().flatten(1).mean(1)


@torch.no_grad()
def ddim_sample(predict: Callable, noise: Tensor, y: Tensor, steps: int = 50) -> Tensor:
    """DDIM with eta 0, as diffusers' DDIMScheduler has it: noise (B, C, H, W), y (B,) -> x0 in [-1, 1].

    `steps` (1..1000) timesteps ("leading": 980, 960, .., 0 for 50); x0_hat is clipped to [-1, 1], the
    direction keeps the unclipped eps_hat, and the last step goes to abar = 1.
    """
    abar, stride, x = alphas_cumprod(noise.device), NUM_STEPS // steps, noise
    for t in range((steps - 1) * stride, -1, -stride):
        eps = predict(x, torch.full_like(y, t), y).float()  # under --bf16 it comes as bfloat16
        x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        abar_next = abar[t - stride] if t else torch.ones_like(abar[0])
        x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps
    return x


def sample_images(cfg, model: nn.Module, noise: Tensor, y: Tensor, name: str, steps=None) -> Tensor:
    """DDIM images (N, C, H, W) uint8 of classes y (N,), the i-th from noise[i % M], of noise (M, C, H, W)."""
    model.eval()
    images = torch.zeros(len(y), *noise.shape[1:], dtype=torch.uint8, device=y.device)
    size = math.ceil(min(SAMPLE_BATCH[cfg.device] / cfg.accumulate, len(y) / WORLD))
    parts = torch.arange(len(y), device=y.device).split(size)
    for i in my_share(tqdm(parts, name, leave=False, **BAR)):
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
            images[i] = to_uint8(ddim_sample(model, noise[i % len(noise)], y[i], steps or cfg.sample_steps))
    return all_sum(images)  # the other processes' images were 0 here


# ---- Fisher: F = E[g g^T], taken after a task on its real images at random timesteps, in eval mode. Rank-1
# (Theorem 1): F ~ c* mu mu^T. Rank-K: F ~ sum_j lambda_j v_j v_j^T, its top eigenpairs. Diagonal (EWC, arXiv
# 1612.00796): F_jj = E[g_j^2]. Arguments: any model; images x (N, C, H, W) uint8, or floats as they are, and
# classes y (N,); the number n of samples; a generator on their device; the first timestep and the end;
# loss(predict, x0, t, eps, y) -> (B,), of each sample. FloatingPointError: a gradient is not finite.
# ValueError: a frozen weight, a batch norm that mixes samples, no samples, a loss that is not (B,).


def dot64(a: Tensor, b: Tensor) -> float:
    """a^T b summed in float64: over 37 million weights float32 would round small differences away."""
    return float(a.cpu().double() @ b.cpu().double())


def fisher_batches(x: Tensor, y: Tensor, n: int, generator, timesteps=EVERY_STEP) -> Iterator[tuple]:
    """n samples (x0, t, eps, y) in batches: each image once, in random order, before one comes again."""
    if not (n > 0 and 0 < len(x) == len(y)):
        raise ValueError(f"cannot take {n} samples of {len(x)} images with {len(y)} classes")
    rounds = range(math.ceil(n / len(x)))
    chosen = torch.cat([torch.randperm(len(x), generator=generator, device=x.device) for _ in rounds])
    for index in chosen[:n].split(FISHER_BATCH):
        x0 = to_float(x[index]) if x.dtype == torch.uint8 else x[index]
        yield x0, *draw_noise(x0, generator, timesteps), y[index]


def as_function(model: nn.Module, loss: Callable) -> tuple[dict[str, Tensor], Callable]:
    """The weights theta by name, and loss_at(theta, batch) -> (B,), for torch.func; sets eval mode."""
    theta = {name: p.detach() for name, p in model.eval().named_parameters()}
    if not all(p.requires_grad for p in model.parameters()):
        raise ValueError("the Fisher is of all weights: each must need a gradient (model.requires_grad_())")
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if any(m.running_mean is None for m in batch_norms):
        raise ValueError("a batch norm without running statistics mixes the samples: use another norm")

    def loss_at(theta, batch):
        value = loss(lambda *inputs: functional_call(model, theta, inputs), *batch)
        if value.shape != batch[0].shape[:1]:
            raise ValueError(f"the loss must be a number for each sample, (B,), not {tuple(value.shape)}")
        return value

    return theta, loss_at


def contiguous(_: nn.Module, inputs: tuple) -> tuple:
    """A hook before each module of a network: its inputs in PyTorch's usual memory format."""
    return tuple(v.contiguous() if torch.is_tensor(v) else v for v in inputs)


def rank1_fisher(model, x, y, n, generator, timesteps=EVERY_STEP, loss=per_sample_loss) -> tuple:
    """Theorem 1: mu = E[g] (D,) over n draws and c* = E[(mu^T g)^2] / ||mu||^4, a scalar, over n fresh ones.

    c* is the least-squares coefficient of F on mu mu^T. Over the draws that gave mu it would be biased up, as
    mu^T g_i then contains ||g_i||^2 / n. A batch takes one backward pass for mu, and one forward-mode
    derivative for all its mu^T g_i at once: no gradient of a single sample is ever made.
    """
    theta, loss_at = as_function(model, loss)
    total = torch.zeros_like(flat(theta.values()))  # the sum of all g_i
    for batch in my_share(fisher_batches(x, y, n, generator, timesteps)):
        sum_of_losses = loss(model, *batch).sum()
        total += flat(torch.autograd.grad(sum_of_losses, model.parameters(), materialize_grads=True))
        if not total.isfinite().all():
            list(gradients(model, [batch], loss))  # raises an error that names the sample
    mu = all_sum(total) / n

    norm = math.sqrt(dot64(mu, mu))
    if not 0 < norm < math.inf:
        raise FloatingPointError(f"||mu|| is {norm}: the loss does not depend on the weights, or overflows")
    u = dict(zip(theta, shaped(mu / norm, theta.values())))  # mu's direction, in the shapes of the weights
    squares = torch.zeros_like(mu[0])  # the sum of (u^T g_i)^2
    for batch in my_share(fisher_batches(x, y, n, generator, timesteps)):
        # Other attention kernels have no forward mode, in which group norm also needs contiguous inputs.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), register_module_forward_pre_hook(contiguous):
            _, along_u = jvp(partial(loss_at, batch=batch), (theta,), (u,))  # (B,) u^T g_i
        squares += along_u.square().sum()
    return mu, all_sum(squares) / n / norm**2  # E[(mu^T g)^2] / ||mu||^4, as mu = norm u


def gradients(model: nn.Module, batches: Iterable, loss: Callable = per_sample_loss) -> Iterator[Tensor]:
    """g_i of every sample, in chunks (b, D): much slower than their sum."""
    theta, loss_at = as_function(model, loss)
    device = next(model.parameters()).device
    # Making a chunk takes at most 1 GB, or on a GPU a quarter of what is free.
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 10**9
    chunk = max(1, memory // (8 * sum(p.numel() for p in theta.values())))
    gradient = grad(lambda theta, *sample: loss_at(theta, [v[None] for v in sample])[0])
    for batch in batches:
        for part in zip(*(v.split(chunk) for v in batch)):
            with sdpa_kernel(SDPBackend.MATH):  # other attention kernels cannot be batched so
                g = vmap(gradient, in_dims=(None, *(0 for _ in part)))(theta, *part)  # each (b, *shape)
            g = torch.cat([v.flatten(1) for v in g.values()], 1)
            for i in (~g.sum(1).isfinite()).nonzero().flatten().tolist():  # a sum is finite if all parts are
                sample = f"class {part[3][i]}, timestep {part[1][i]}, loss {loss_at(theta, part)[i]:g}"
                raise FloatingPointError(f"the gradient of a sample is not finite ({sample})")
            yield g


def diagonal_fisher(model, x, y, n, generator, timesteps=EVERY_STEP, loss=per_sample_loss) -> Tensor:
    """F_jj = E[g_j^2] (D,) over n draws, from the gradients of single samples."""
    total = torch.zeros_like(flat(model.parameters()).detach())
    for g in gradients(model, my_share(fisher_batches(x, y, n, generator, timesteps)), loss):
        total += g.square_().sum(0)  # in place: a chunk is large, and new memory takes longer than the square
    return all_sum(total) / n


def eigenpairs(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """F = G^T G / N's eigenvalues (N,), falling, and first k eigenvectors (k, D), of gradients G (N, D)."""
    # From the Gram matrix G G^T / N, which has the same eigenvalues: nothing of size D x D is made.
    values, U = torch.linalg.eigh((G @ G.T).cpu().double() / len(G))
    values, U = values.flip(0).clamp(min=1e-30), U.flip(1)
    return values, (U[:, :k] / (len(G) * values[:k]).sqrt()).T.to(G) @ G  # v_j = G^T u_j / sqrt(N lambda_j)


def rank_k_fisher(model, x, y, n, generator, timesteps=EVERY_STEP, k=1) -> tuple[Tensor, Tensor]:
    """F's top eigenvectors v_j (k, D) and eigenvalues lambda_j (k,), of n gradients or as many as fit.

    ValueError: fewer than k gradients fit.
    """
    n = min(n, GRADIENTS, GRADIENT_FLOATS // sum(p.numel() for p in model.parameters()))
    if n < k:
        raise ValueError(f"rank {k} needs at least {k} gradients, not {n}")
    G = torch.cat(list(gradients(model, fisher_batches(x, y, n, generator, timesteps))))
    values, vectors = eigenpairs(G, k)
    return vectors, values[:k].to(vectors)


# ---- Penalties: what keeps the weights near the old tasks'. Both are the exact sum over all old tasks. After
# a task, add(Fisher, theta*) stores it and returns its numbers for result.json; drift(theta) says how far the
# weights are from the old tasks', weighted as in the penalty; penalty(theta) is a scalar on top of the next
# task's loss, before the first add 0. vars(penalty) is all of it.


class LowRankPenalty:
    """(lam/2) sum_k sum_j c_kj (v_kj^T (theta - theta*_k))^2, over old tasks k and directions j.

    With the one direction mu_k and c*_k it is the paper's rank-1 EWC; or with F_k's top eigenpairs. Only the
    newest theta* is kept, as the origin, and for each direction the number offset = v^T (origin - theta*_k):
    v^T (theta - theta*_k) = v^T (theta - origin) + offset.
    """

    def __init__(self, lam: float):
        self.lam = lam
        self.v = self.c = self.offset = self.origin = None  # no task yet

    def add(self, fisher: tuple[Tensor, Tensor], theta_star: Tensor) -> dict[str, float]:
        v, c = torch.atleast_2d(fisher[0]), torch.atleast_1d(fisher[1])
        if self.origin is None:
            self.v, self.c, self.offset, self.origin = v[:0], c[:0], c[:0], theta_star
        moved = theta_star - self.origin
        offset = self.offset + c.new_tensor([dot64(row, moved) for row in self.v])
        self.offset, self.origin = torch.cat([offset, torch.zeros_like(c)]), theta_star
        self.v, self.c = torch.cat([self.v, v]), torch.cat([self.c, c])  # (directions of all tasks, D)
        mu_norm = v[0].norm()
        energy = c[0] * mu_norm**2  # mu^T F mu / ||mu||^2; of rank K lambda_1
        return {"c_star": float(c[0]), "mu_norm": float(mu_norm), "energy": float(energy)}

    def drift(self, theta: Tensor) -> Tensor:
        """v^T (theta - theta*_k) of every direction: the way along it times ||v||. -> (directions,)."""
        return self.v @ (theta - self.origin) + self.offset

    def __call__(self, theta: Tensor) -> Tensor:
        if self.origin is None:
            return theta.new_zeros(())
        return self.lam / 2 * (self.c * self.drift(theta).square()).sum()

    @torch.no_grad()
    def proximal_step(self, weights: Iterable[nn.Parameter], eta: float) -> None:
        """Move the weights theta to the z that minimizes penalty(z) + ||z - theta||^2 / (2 eta)."""
        # Decoupled from Adam, as AdamW's weight decay (arXiv 1711.05101): in the loss, a stiff penalty's
        # gradient enters Adam's second moment and so shrinks the task's steps.
        weights = list(weights)
        theta, stiffness = flat(weights), eta * self.lam * self.c.cpu().double()  # (D,), (directions,)
        system = torch.eye(len(stiffness)) + (self.v @ self.v.T).cpu().double() * stiffness
        drift = torch.linalg.solve(system, self.drift(theta).cpu().double())  # at z
        overwrite(weights, theta - (stiffness * drift).to(theta) @ self.v)


class DiagonalPenalty:
    """(lam/2) sum_k sum_j F_k,jj (theta_j - theta*_k,j)^2, EWC (arXiv 1612.00796).

    The square completed: sum_k F_k (theta - theta*_k)^2 = H (theta - center)^2 + rest, with H = sum_k F_k.
    """

    def __init__(self, lam: float):
        self.lam, self.H, self.center, self.rest = lam, 0.0, 0.0, 0.0  # no task yet

    def add(self, fisher: Tensor, theta_star: Tensor) -> dict[str, float]:
        H, moved = self.H + fisher, theta_star - self.center
        weight = torch.where(H > 0, fisher / H, 0.0)  # of this theta* in the weighted mean of all
        self.rest += dot64(self.H * weight, moved.square())
        self.H, self.center = H, self.center + weight * moved
        return {"trace": float(fisher.sum())}

    def drift(self, theta: Tensor) -> Tensor:
        """(sum_k sum_j F_k,jj (theta_j - theta*_k,j)^2)^1/2, one number of all old tasks. -> (1,)."""
        return ((self.H * (theta - self.center).square()).sum() + self.rest).sqrt()[None]

    def __call__(self, theta: Tensor) -> Tensor:
        return self.lam / 2 * ((self.H * (theta - self.center).square()).sum() + self.rest)


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
    # Beyond the paper's table: F's top eigenvector in mu's place, and its top K.
    "rank1-eig": Method(True, True, fisher=partial(rank_k_fisher, k=1), penalty=LowRankPenalty),
    "rank2": Method(True, True, fisher=partial(rank_k_fisher, k=2), penalty=LowRankPenalty),
    "rank4": Method(True, True, fisher=partial(rank_k_fisher, k=4), penalty=LowRankPenalty),
}


# ---- Generative distillation (arXiv 2311.14028): the teacher, the frozen model of the last task, paints
# images of all old classes; on these the student imitates the teacher, on the real ones it finds the noise.


def replay_pool(cfg: Settings, teacher: UNet, shape: tuple, num_old: int) -> tuple[Tensor, Tensor]:
    """The teacher's images of the classes 0..num_old-1, equally many of each. -> (N, C, H, W) uint8, (N,)."""
    device = next(teacher.parameters()).device
    # As in the authors' code, the n-th image starts from the same noise for every class and after every task.
    generator = rng(device, cfg.seed, "replay pool")
    noise = torch.randn(cfg.replay_per_class, *shape, generator=generator, device=device)
    y = torch.arange(num_old, device=device).repeat_interleave(cfg.replay_per_class)
    return sample_images(cfg, teacher, noise, y, "replay pool", cfg.replay_steps), y


def losses(student, teacher, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """L_T, the denoising loss on the real rows, and L_GD, the distance from the teacher on the replayed rows.

    x0, eps (B, C, H, W), t, y (B,). With a teacher the first half of the rows is real, the second replayed;
    without one (None) L_T is over all rows, L_GD is 0. In the authors' code too the student runs once.
    """
    x_t = add_noise(x0, t, eps)
    eps_student = student(x_t, t, y)
    if teacher is None:
        return F.mse_loss(eps_student, eps), eps.new_zeros(())
    half = len(y) // 2
    with torch.no_grad():
        eps_teacher = teacher(x_t[half:], t[half:], y[half:])
    denoise = F.mse_loss(eps_student[:half], eps[:half])
    distill = F.mse_loss(eps_student[half:], eps_teacher)
    return denoise, distill


# ---- Metric: FID of a task's test images against as many samples with the same labels (arXiv 1706.08500), on
# Inception features or, with no download, on a small classifier's. features(images uint8) -> (N, d) float.

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rank1_ewc"


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features (N_a, d), (N_b, d), both N >= 2."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    # With A, B the centred features over sqrt(N - 1), M = A B^T, the last trace is that of (M M^T)^1/2: from
    # eigenvalues, as a matrix square root is slow and fails where N < d. QR's R has the same A^T A in d rows.
    A, B = ((v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (a, b))
    A, B = (np.linalg.qr(v, mode="r") if len(v) > v.shape[1] else v for v in (A, B))
    M = A @ B.T
    cross = np.sqrt(np.linalg.eigvalsh(M @ M.T).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.square(A).sum() + np.square(B).sum() - 2 * cross)


@torch.no_grad()
def in_parts(network: Callable, images: Tensor, device: torch.device) -> np.ndarray:
    """network(images) as an array, 200 images at once on the device."""
    return torch.cat([network(part.to(device)).float().cpu() for part in images.split(200)]).numpy()


def inception_features(device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """images (N, 1 or 3, H, W) uint8 -> Inception features (N, 2048). Stops without the weights."""
    try:  # clean-fid (arXiv 2104.11222) resizes so inside the network, as for the published numbers
        network = cleanfid.features.build_feature_extractor("legacy_tensorflow", device, False)
    except DAMAGED as error:
        stop(f"no Inception weights ({error}): put inception-2015-12-05.pt into /tmp, or --fid classifier")
    return lambda images: in_parts(lambda v: network(v.expand(-1, 3, -1, -1).float()), images, device)


def classifier_features(name: str, data: Data, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """images uint8 -> features (N, 64) of a small CNN, trained once on the real images, kept in CACHE."""
    torch.manual_seed(0)
    # SiLU is smooth: a unit that is dead on two classes would make their covariance singular.
    layers = [nn.Conv2d(data.x.shape[1], 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU()]
    layers += [nn.Flatten(), nn.Linear(64 * math.ceil(data.x.shape[2] / 4) ** 2, 64), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(64, int(data.y.max()) + 1)).to(device)
    digest = hashlib.sha256(data.x.numpy().tobytes() + data.y.numpy().tobytes()).hexdigest()[:12]
    path = CACHE / f"classifier-{name}-{digest}.pt"
    if not path.exists():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        generator = rng(torch.device("cpu"), "classifier")
        for _ in tqdm(range(1000), desc="classifier for the FID", unit="step", leave=False, **BAR):
            index = torch.randint(len(data.y), (128,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(to_float(data.x[index].to(device))), data.y[index].to(device)).backward()
            optimizer.step()
        with whole(path) as file:
            torch.save(model.state_dict(), file)
    try:
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except DAMAGED as error:
        stop(f"{path} is damaged ({type(error).__name__}): remove it, and it is made again")
    right = in_parts(lambda v: model(to_float(v)), data.test_x, device).argmax(1) == data.test_y.numpy()
    print(f"FID features: a classifier of {name}, {right.mean():.1%} right on its test images")
    return lambda images: in_parts(lambda v: model[:-1](to_float(v)), images, device)


def afid_and_forgetting(fid: list[list[float | None]]) -> tuple[list[float], float | None]:
    """fid[j][k]: FID on task k after task j, None for k > j. -> AFID after each task, final forgetting.

    AFID_j = mean over k <= j of FID_k(m_j); forgetting = (1/T) sum_k (FID_k(m_T) - FID_k(m_k)).
    Joint training has one row, of all tasks, and forgets nothing: None.
    """
    matrix = np.array(fid, dtype=float)  # None becomes nan
    forgetting = float((matrix[-1] - matrix.diagonal()).mean()) if len(matrix) == len(matrix[0]) else None
    return np.nanmean(matrix, axis=1).tolist(), forgetting


# ---- A run's state: all that it needs to go on, and what checkpoint.pt holds. No generator is in it: each
# epoch, each painting and each evaluation draws from a fresh one, seeded by what it is for.


@dataclass
class State:
    """Where a run stands, between two epochs."""

    model: UNet
    optimizer: torch.optim.Optimizer | None = None
    teacher: UNet | None = None  # the frozen model of the last task, with replay
    penalty: LowRankPenalty | DiagonalPenalty | None = None
    average: Tensor | None = None  # (D,) of this task's weights, with --ema
    task: int = 0  # tasks done
    epoch: int = 0  # epochs done of the next one
    step: int = 0  # training steps done of it
    fid: list = field(default_factory=list)  # a row a task done, a column a task; None: not yet learned
    fid_pooled: float | None = None  # joint: one FID of all classes
    fid_real: list = field(default_factory=list)  # of real training images, a number a task
    fisher: list = field(default_factory=list)  # of each task but the last: c*, ||mu||, ..
    drift: list = field(default_factory=list)  # after each task but the first
    seconds: dict = field(default_factory=dict)  # spent on each part
    log: list = field(default_factory=list)  # mean losses, a line an epoch


def new_state(cfg: Settings, data: Data, device: torch.device) -> State:
    """Before the first step: random weights from the seed."""
    torch.manual_seed(cfg.seed)  # the global generator gives the initial weights
    try:
        model = UNet(data.x.shape[1], int(data.y.max()) + 1, cfg.channels, cfg.layers_per_block, cfg.dropout)
    except ValueError as error:
        stop(f"--channels: {error}")
    penalty = METHODS[cfg.method].penalty
    return State(model.to(device), penalty=penalty(cfg.lam) if penalty else None)


def begin_task(cfg: Settings, state: State) -> None:
    """Copy and freeze the model as the teacher; a fresh Adam; the average begins with the weights of now."""
    if METHODS[cfg.method].replay and state.task > 0:
        state.teacher = copy.deepcopy(state.model).eval().requires_grad_(False)
    fused = cfg.device == "cuda" or None  # all weights in a few kernels
    state.optimizer = torch.optim.Adam(state.model.parameters(), lr=cfg.lr, fused=fused)
    state.average = flat(state.model.parameters()).detach() if cfg.ema else None


def settings_of(cfg: Settings) -> dict:
    """What the numbers of a run depend on."""
    return {name: value for name, value in vars(cfg).items() if name not in MAY_CHANGE}


def refuse_other(settings: dict, script: str | None, cfg: Settings, path: Path) -> None:
    """Stop if `path` is of a run with other settings; say so if it is of another version of this script."""
    for name, (default, *_) in SETTINGS.items():
        old, new = settings.get(name, default), getattr(cfg, name)
        if old != new and name not in MAY_CHANGE:
            made = f"{path} was made with --{name.replace('_', '-')} {old}, not {new}"
            stop(f"{made}: --fresh starts over, --out names another folder")
    if script != SCRIPT:
        tqdm.write(f"note: {path} was made by another version of this script (--fresh starts over)")


def save_checkpoint(cfg: Settings, state: State) -> None:
    """The state goes to checkpoint.pt, and its log, for people, to log.jsonl. Rank 0 alone writes."""
    saved = vars(state) | {"settings": settings_of(cfg), "script": SCRIPT}
    for name in ("model", "optimizer", "teacher"):
        saved[name] = saved[name].state_dict() if saved[name] else None
    saved["penalty"] = vars(state.penalty) if state.penalty else None
    if RANK == 0:
        with whole(cfg.out / "checkpoint.pt") as file:
            torch.save(saved, file)
        with whole(cfg.out / "log.jsonl") as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in state.log)


def load_checkpoint(cfg: Settings, state: State) -> None:
    """Bring a new state to where checkpoint.pt stands, if there is one. Stops if it is damaged."""
    path, device = cfg.out / "checkpoint.pt", next(state.model.parameters()).device
    if path.exists():
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            refuse_other(saved.pop("settings"), saved.pop("script"), cfg, path)
            state.task = saved["task"]
            if saved["epoch"] > 0:
                begin_task(cfg, state)  # makes the optimizer and the teacher, which are then filled
            for name in ("model", "optimizer", "teacher"):
                weights = saved.pop(name)
                if weights:
                    getattr(state, name).load_state_dict(weights)
            if state.penalty:
                vars(state.penalty).update(saved.pop("penalty"))
            vars(state).update(saved)
        except torch.OutOfMemoryError:
            raise
        except DAMAGED as error:
            stop(f"{path} is damaged ({type(error).__name__}): remove it or give --fresh, to start over")
        tqdm.write(f"going on from {path}: {state.task} of {cfg.tasks} tasks and {state.epoch} epochs done")
    position = torch.tensor([state.task, state.epoch])
    if not torch.equal(all_sum(position.clone()), position * WORLD):
        stop("the processes do not see the same files: --out must be a folder that all of them see")


@contextmanager
def timed(state: State, part: str) -> Iterator[None]:
    """Add the seconds that the block takes to those of a part of the run."""
    started = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    state.seconds[part] = state.seconds.get(part, 0.0) + time.perf_counter() - started


# ---- Training: an epoch's batches, a step, a task, all tasks. L_T, L_GD and the penalty meet in train_step.


def epoch_batches(cfg: Settings, state: State, task: Data, replay, size: int) -> Iterator[tuple]:
    """An epoch's batches (x0, t, eps, y): `size` real images each, then as many of the replay, if any."""
    purposes = ("order", "noise", "replay", "dropout")
    x, y, device = task.x, task.y, task.x.device
    draw = {purpose: rng(device, cfg.seed, purpose, state.task, state.epoch) for purpose in purposes}
    torch.manual_seed(draw["dropout"].initial_seed() + RANK)  # nn.Dropout knows only the global generator
    order = torch.randperm(len(x), generator=draw["order"], device=device)
    for index in order[: len(x) // size * size].split(size):  # full batches: a random remainder is left out
        images, labels = x[index], y[index]
        if replay:
            old_x, old_y = replay
            old = torch.randint(len(old_y), (size,), generator=draw["replay"], device=device)
            images, labels = torch.cat([images, old_x[old]]), torch.cat([labels, old_y[old]])
        x0 = to_float(images)
        yield x0, *draw_noise(x0, draw["noise"]), labels


def losses_and_gradient(cfg: Settings, state: State, *batch: Tensor) -> tuple[Tensor, Tensor]:
    """L_T and L_GD (2,) of a batch (x0, t, eps, y), and the gradient (D,) of their sum."""
    teacher = state.teacher if METHODS[cfg.method].distill else None
    with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):  # for tensor cores
        denoise, distill = losses(state.model, teacher, *batch)
    gradient = torch.autograd.grad(denoise + distill, [*state.model.parameters()])
    return torch.stack([denoise, distill]).detach(), flat(gradient)


class Recorded:
    """function(*tensors) as a CUDA graph, for tensors that keep their shapes.

    A GPU is done with a small kernel sooner than the CPU has started the next. So the thousands of a step are
    recorded at the first call, and from then on started at once. All else that the function reads, as the
    weights, must stay where it lies in memory; the next call overwrites the result.
    """

    def __init__(self, function: Callable):
        self.function, self.graph = function, None

    def record(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors, self.graph = [*map(torch.clone, tensors)], torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(side):
            self.function(*self.tensors)  # what a first call sets up is not to be recorded
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.result = self.function(*self.tensors)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self.graph:
            self.record(tensors)
        for mine, given in zip(self.tensors, tensors):
            mine.copy_(given)
        self.graph.replay()
        return self.result


def gradient_function(cfg: Settings, state: State) -> Callable:
    """losses_and_gradient of a task's batches, recorded if --cuda-graph is on."""
    gradient_of = partial(losses_and_gradient, cfg, state)
    return Recorded(gradient_of) if cfg.cuda_graph else gradient_of


def train_step(cfg: Settings, state: State, batch: tuple, gradient_of: Callable) -> Tensor:
    """One step of Adam on L_T + L_GD + the EWC penalty, of a batch of epoch_batches. -> these losses (3,)."""
    parts, step_losses, gradient = WORLD * cfg.accumulate, torch.zeros(3, device=batch[0].device), 0.0
    # Part i takes the rows i, i + parts, ..: each part is half real, half replayed, like the whole batch.
    for i in range(RANK, parts, WORLD):
        part_losses, part_gradient = gradient_of(*(v[i::parts].contiguous() for v in batch))
        step_losses[:2] += part_losses / parts
        gradient = gradient + part_gradient / parts
    all_sum(step_losses)  # each process has the losses and the gradient of its own rows
    all_sum(gradient)
    weights = [*state.model.parameters()]
    for p, values in zip(weights, shaped(gradient, weights)):
        p.grad = values  # to which the penalty's backward() adds
    if state.penalty and state.task > 0:  # after the sum: once, and the same in every process
        ewc = state.penalty(flat(weights))
        step_losses[2] = ewc.detach()
        if cfg.form == "loss":
            ewc.backward()
    state.optimizer.step()
    if cfg.form == "proximal" and state.task > 0:
        state.penalty.proximal_step(weights, state.optimizer.param_groups[0]["lr"])
    return step_losses


def train_task(cfg: Settings, state: State, task: Data, replay: tuple | None) -> None:
    """The epochs of a task, from where the state stands. FloatingPointError: a loss is not finite."""
    n, parts, saved_at = len(task.y), WORLD * cfg.accumulate, time.monotonic()
    size = min(cfg.batch_size, n)
    if size % parts:
        stop(f"a task has only {n} images: --batch-size must be at most that, and a multiple of {parts}")
    steps, name = cfg.epochs * (n // size), f"task {state.task + 1}/{cfg.tasks} {cfg.method}"
    gradient_of = gradient_function(cfg, state)
    with tqdm(initial=state.step, total=steps, desc=name, unit="step", **BAR) as bar:
        while state.epoch < cfg.epochs:
            state.model.train()
            epoch_losses = []
            with timed(state, "train"):
                for batch in epoch_batches(cfg, state, task, replay, size):
                    if cfg.lr_decay == "linear":
                        state.optimizer.param_groups[0]["lr"] = cfg.lr * (1 - state.step / steps)
                    epoch_losses.append(train_step(cfg, state, batch, gradient_of))
                    if cfg.ema:
                        state.average.lerp_(flat(state.model.parameters()).detach(), 1 - cfg.ema)
                    state.step += 1
                    bar.update()
            state.epoch += 1
            means = dict(zip(("denoise", "distill", "ewc"), torch.stack(epoch_losses).mean(0).tolist()))
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"task {state.task + 1}'s loss is not finite in epoch {state.epoch}")
            state.log.append({"task": state.task + 1, "epoch": state.epoch, "step": state.step} | means)
            bar.set_postfix({name: f"{v:.4f}" for name, v in means.items() if v}, refresh=False)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save_checkpoint(cfg, state)
                saved_at = time.monotonic()
    if cfg.ema:  # the task ends with the averaged weights
        overwrite([*state.model.parameters()], state.average)


def evaluate(cfg: Settings, state: State, tasks: list[Data], real: list, features: Callable, device) -> None:
    """The FID of each of these tasks: its test images' features `real` against those of as many samples."""
    sampled = []
    for k, task in enumerate(tasks):  # the same noise after every task: only the model changes a FID
        noise = torch.randn(task.test_x.shape, generator=rng(device, cfg.seed, "FID", k), device=device)
        images = sample_images(cfg, state.model, noise, task.test_y.to(device), f"samples of task {k + 1}")
        sampled.append(features(images))
    row = [frechet_distance(a, b) for a, b in zip(real, sampled)]
    state.fid.append(row + [None] * (cfg.tasks - len(tasks)))
    if METHODS[cfg.method].joint:
        state.fid_pooled = frechet_distance(np.concatenate(real), np.concatenate(sampled))
    tqdm.write(f"after task {len(tasks)}, FID ({cfg.fid_features}): {'  '.join(f'{v:.1f}' for v in row)}")


def run(cfg: Settings, data: Data, features: Callable[[Tensor], np.ndarray], device: torch.device) -> dict:
    """Train task after task, from a checkpoint on, and measure after each. -> what result.json then holds.

    data: all images, sorted by class; features: images uint8 -> FID features (N, d).
    """
    method, tasks = METHODS[cfg.method], split_tasks(data, cfg.tasks)
    stages = [data] if method.joint else tasks  # what is learned, one after the other
    state = new_state(cfg, data, device)
    load_checkpoint(cfg, state)
    real = [features(task.test_x) for task in tasks]
    if not state.fid_real:  # what a perfect model would score: training images, at random, in samples' place
        generator = rng(torch.device("cpu"), cfg.seed, "real")
        for task, test_features in zip(tasks, real):
            chosen = torch.randperm(len(task.x), generator=generator)[: len(task.test_x)]
            state.fid_real.append(frechet_distance(test_features, features(task.x[chosen])))

    while state.task < len(stages):
        if state.epoch == 0:
            begin_task(cfg, state)
        k, replay = state.task, None
        task = stages[k]._replace(x=stages[k].x.to(device), y=stages[k].y.to(device))
        seen = tasks if method.joint else tasks[: k + 1]
        if method.replay and k > 0:
            with timed(state, "replay"):  # the teacher's paintings of all old classes
                replay = replay_pool(cfg, state.teacher, task.x.shape[1:], int(task.y.min()))
        train_task(cfg, state, task, replay)
        if method.penalty:
            theta = flat(state.model.parameters()).detach()
            if k > 0:
                state.drift.append(state.penalty.drift(theta).tolist())
            if k + 1 < cfg.tasks:
                draws = (cfg.fisher_samples, rng(device, cfg.seed, "fisher", k), cfg.fisher_timesteps)
                with timed(state, "fisher"):
                    try:
                        fisher = method.fisher(state.model, task.x, task.y, *draws)
                    except ValueError as error:
                        stop(f"{error}: raise --fisher-samples or lower --channels")
                state.fisher.append(state.penalty.add(fisher, theta))
        with timed(state, "fid"):
            evaluate(cfg, state, seen, real, features, device)
        save_progress(cfg, state, seen, device)

        state.task, state.epoch, state.step = k + 1, 0, 0
        state.optimizer = state.teacher = state.average = None  # the next task begins with new ones
        save_checkpoint(cfg, state)
    result = result_of(cfg, state)
    if RANK == 0:
        with whole(cfg.out / "model.pt") as file:
            torch.save(state.model.state_dict(), file)
        write_json(cfg.out / "result.json", result)
        (cfg.out / "partial.json").unlink(missing_ok=True)
    return result


# ---- What a run shows: result.json (partial.json until all tasks are learned), a table, curves, pictures.


def result_of(cfg: Settings, state: State) -> dict:
    """What result.json holds."""
    packages = ("torch", "torchvision", "clean-fid", "scipy", "numpy", "scikit-learn")
    result = {name: getattr(cfg, name) for name in ("dataset", "method", "lam", "seed", "fid_features")}
    result |= {name: getattr(state, name) for name in ("fid", "fid_pooled", "fid_real", "fisher", "drift")}
    result["afid"], result["forgetting"] = afid_and_forgetting(state.fid)
    result |= {"config": settings_of(cfg), "script": SCRIPT, "processes": WORLD, "cuda_graph": cfg.cuda_graph}
    result["versions"] = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    return result | {"seconds": {part: round(v, 1) for part, v in state.seconds.items()}}


def write_json(path: Path, content: dict) -> None:
    """A line a key, the file whole or not at all."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    with whole(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_result(path: Path) -> dict:
    """A run's result.json. Stops if it is not one."""
    try:
        result = json.loads(path.read_text())
        result["config"], table(result)  # fails if anything of this is missing
    except DAMAGED as error:
        stop(f"{path} is damaged ({type(error).__name__}): remove it, or start its run over with --fresh")
    return result


def table(result: dict) -> str:
    """The FID matrix, AFID and forgetting as lines of text."""
    tasks = len(result["fid_real"])
    title = f"{result['dataset']}, {result['method']}: FID of each task (features: {result['fid_features']})"
    lines = ["", title, "after task  " + "".join(f"{f'task {k + 1}':>9}" for k in range(tasks)) + "     AFID"]
    for row, afid in zip(result["fid"], result["afid"]):
        cells = "".join(" " * 9 if v is None else f"{v:9.1f}" for v in [*row, afid])
        lines.append(f"{tasks - row.count(None):>10}  {cells}")
    lines.append(f"real images {''.join(f'{v:9.1f}' for v in result['fid_real'])}   (training, not test)")
    energies = [fisher["energy"] for fisher in result["fisher"] if "energy" in fisher]
    if energies:
        cells = "".join(f"{result['lam'] * energy:9.3g}" for energy in energies)
        lines += ["", f"curvature   {cells}   (lambda c* ||mu||^2, what the penalty adds along mu)"]
    forgetting = "-" if result["forgetting"] is None else f"{result['forgetting']:.2f}"
    lines += ["", f"AFID {result['afid'][-1]:.2f}   forgetting {forgetting}   (lower is better)", ""]
    return "\n".join(lines)


def save_progress(cfg: Settings, state: State, tasks: list[Data], device) -> None:
    """After a task: partial.json, fid.png (each task's FID so far, and their mean), samples-task<k>.png."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    after = [cfg.tasks - row.count(None) for row in state.fid]  # the tasks learned by then
    names = [f"task {k + 1}" for k in range(cfg.tasks)]
    axes.plot(after, np.array(state.fid, float), "o-", alpha=0.7, label=names)  # None becomes nan: no point
    axes.plot(after, afid_and_forgetting(state.fid)[0], "ks--", label="AFID")
    axes.set(xlabel="after task", ylabel=f"FID (features: {cfg.fid_features})", xticks=after, ylim=(0, None))
    axes.set_title(f"{cfg.dataset}, {cfg.method}, seed {cfg.seed}")
    figure.legend(loc="outside right center")
    # Of two classes of each task ten samples each, a class a row, from the same noises.
    y = torch.cat([task.test_y.unique()[:2] for task in tasks]).to(device).repeat_interleave(10)
    noise = torch.randn(10, *tasks[0].x.shape[1:], generator=rng(device, cfg.seed, "picture"), device=device)
    images = sample_images(cfg, state.model, noise, y, "pictures").cpu() / 255
    images = F.interpolate(images, scale_factor=max(1, 32 // images.shape[-1]))  # 32x32 pixels each
    if RANK == 0:
        with whole(cfg.out / "fid.png") as file:
            figure.savefig(file, dpi=120)
        with whole(cfg.out / f"samples-task{len(tasks)}.png") as file:
            torchvision.utils.save_image(images, file, format="png", nrow=10, pad_value=0.5)
        write_json(cfg.out / "partial.json", result_of(cfg, state))


def parse_args(argv: list[str] | None = None) -> Settings:
    """The paper's settings; over them the dataset's row, then --small and --limit, then the command line."""
    epilog = "(..): the paper's value, or else the default. The digits, --small and --limit have others."
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=epilog, allow_abbrev=False)
    parser.error = stop
    for name, (value, kind, limits, text) in SETTINGS.items():
        choices = {"dataset": DATASETS, "method": METHODS}.get(name, limits if kind is str else None)
        yes_or_no = {"action": argparse.BooleanOptionalAction}
        options = yes_or_no if kind is bool else {"type": kind, "choices": choices}
        shown = ",".join(map(str, value)) if kind is numbers else value
        text = text if value is None or value is False else f"{text} ({shown})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    for name, value in given.items():
        _, kind, limits, _ = SETTINGS[name]
        values = value if kind is numbers else [value] if kind in (int, float) else []
        if not all(limits[0] <= v <= limits[1] for v in values):
            stop(f"--{name.replace('_', '-')} must be from {limits[0]:g} to {limits[1]:g}, not {value}")
    settings = {name: row[0] for name, row in SETTINGS.items()}
    settings |= DATASETS[given.get("dataset", settings["dataset"])]
    small = given.get("small") and settings["channels"] != DIGITS["channels"]  # digits are small
    settings |= SMALL if small else {}
    if "limit" in given:
        settings["replay_per_class"] = min(given["limit"], settings["replay_per_class"])
        settings["fisher_samples"] = min(2 * given["limit"], settings["fisher_samples"])  # of two classes
    cfg = Settings(**settings | given)
    penalty, parts = METHODS[cfg.method].penalty, WORLD * cfg.accumulate
    cfg.lam = cfg.lam if penalty else 0.0
    if cfg.batch_size % parts:
        stop(f"--batch-size {cfg.batch_size} must be a multiple of {parts} (processes x --accumulate)")
    if cfg.form == "proximal" and penalty is not LowRankPenalty:
        stop("--form proximal is for the rank methods: leave it out")
    if len(cfg.fisher_timesteps) != 2 or cfg.fisher_timesteps[0] >= cfg.fisher_timesteps[1]:
        stop(f"--fisher-timesteps must be a timestep and a later end, as 0,{NUM_STEPS}")
    cfg.out = cfg.out or Path("runs-small" if small else "runs", cfg.dataset, f"{cfg.method}+seed={cfg.seed}")
    return cfg


def set_up(cfg: Settings) -> torch.device:
    """Start the processes and find the device, each process its own; settle what depends on it."""
    if WORLD > 1:
        dist.init_process_group(timeout=timedelta(days=1))  # gloo on CPUs, NCCL on GPUs
        sys.stdout = sys.stdout if RANK == 0 else io.StringIO()  # rank 0 speaks for all
    name = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    try:
        device = torch.zeros(1, device=f"cuda:{LOCAL_RANK}" if name == "cuda" else name).device
        if device.type not in ("cpu", "cuda", "mps") or (WORLD > 1 and name[-1].isdigit()):
            raise RuntimeError  # of several processes each takes its own device
    except (RuntimeError, AssertionError):
        stop(f"--device {cfg.device} is not there for process {RANK}: choose auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cfg.device = device.type
    if device.type == "cpu" and sum(cfg.channels) < 100:
        # Two threads are faster on idle cores, but much slower where one is busy: `make bench` measures both.
        torch.set_num_threads(1)
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    cfg.bf16 = ampere if cfg.bf16 is None else cfg.bf16
    cfg.cuda_graph = device.type == "cuda" and cfg.cuda_graph is not False
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: mu is a mean that all but cancels
    return device


def prepare(cfg: Settings, device: torch.device) -> tuple[Data, Callable[[Tensor], np.ndarray]]:
    """The data, and the features of the FID; cfg.fid_features becomes their name."""
    data, levels = load_data(cfg.dataset, cfg.data_dir), len(cfg.channels)
    split_tasks(data, cfg.tasks)  # stops, if it does, before the classifier is trained
    height, size = data.x.shape[2:]
    if height != size:
        stop(f"{cfg.dataset} has images of {height}x{size} pixels: they must be square")
    if size % 2 ** (levels - 1) or size == 2 ** (levels - 1):  # a group norm needs more than one pixel
        stop(f"--channels: {levels} levels, each of half the size, do not fit {size}x{size} images")
    if device.type == "cpu" and sum(cfg.channels) > 256:
        print("note: this network takes months on a CPU; for a quick look in minutes: --small --limit 50")
    if cfg.fid == "inception":
        features, cfg.fid_features = inception_features(device), "inception, legacy_tensorflow"
    else:
        features = classifier_features(cfg.dataset, data, device)
        cfg.fid_features = f"{cfg.dataset}-classifier"
    if cfg.limit:
        data = limit_classes(data, cfg.limit)
        cfg.fid_features += f", limit {cfg.limit}"
    return data, features


def main(argv: list[str] | None = None) -> dict:
    """Check everything that can be checked, then run, or go on with a run that was stopped."""
    cfg = parse_args(argv)
    finished = cfg.out / "result.json"
    try:
        device = set_up(cfg)
        if finished.exists() and not cfg.fresh:
            result = read_result(finished)
            refuse_other(result["config"], result.get("script"), cfg, finished)
            print(f"{table(result)}\n{finished} is of a finished run (--fresh starts it over)")
            return result
        cfg.out.mkdir(parents=True, exist_ok=True)
        # The kernel drops this lock if its holder dies.
        with filelock.FileLock(cfg.out / ".lock", blocking=False) if RANK == 0 else nullcontext():
            turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
            for i in range(3):  # one process may have to download, then one of each other machine, then all
                if i == turn:
                    data, features = prepare(cfg, device)
                    if cfg.fresh and RANK == 0:
                        for name in ("result.json", "partial.json", "checkpoint.pt", "model.pt"):
                            (cfg.out / name).unlink(missing_ok=True)
                all_sum(torch.zeros(1))  # all wait here
            cfg.fresh = False  # an interrupted run goes on without it
            result = run(cfg, data, features, device)
    except KeyboardInterrupt as interrupt:
        again = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--fresh" or cfg.fresh]
        command = shlex.join([*(["torchrun", ".."] if WORLD > 1 else [sys.executable]), sys.argv[0], *again])
        if RANK == 0:
            print(f"\nrank1_ewc: interrupted; to go on from the last checkpoint: {command}", file=sys.stderr)
        raise SystemExit(128 + (*interrupt.args, signal.SIGINT)[0]) from None
    except filelock.Timeout:
        stop(f"another run writes into {cfg.out}: wait for it, or name another folder with --out")
    except FloatingPointError as error:
        stop(f"{error}: lower --lr (now {cfg.lr:g}) or --lam (now {cfg.lam:g})")
    except OSError as error:
        place = error.filename or f"{cfg.out}, or the output,"
        stop(f"{place} cannot be read or written ({error.strerror or error})")
    except torch.OutOfMemoryError:
        stop(f"{cfg.device} has too little memory: raise --accumulate ({cfg.accumulate}) or lower --channels")
    print(f"{table(result)}\nIn {cfg.out}: result.json, fid.png, samples-task<k>.png, log.jsonl, model.pt")
    return result


def terminate(number: int, _) -> NoReturn:
    """A cluster's warning (SIGTERM) ends the run as Ctrl-C does, with a status of its own."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    main()
    if WORLD > 1:
        dist.destroy_process_group()
