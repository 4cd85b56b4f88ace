"""How much faster is this project's code than the plain way to write it, and do both compute the same?

    python -m results.bench            # half an hour on two cores: bench-<device>.json, .md
    python -m results.bench --growth   # what runs of 2, 5 and 10 tasks cost: growth.json, .png
    python -m results.bench --tricks   # what makes a GPU faster, trick by trick: tricks-<device>.json, .md

They write into results/pages/cost, or --to FOLDER; with --small, which tries them in small sizes, only --to.
On a GPU, in less than ten minutes (the second line with --small rehearses it, also on a CPU):

    timeout 110 python -m pytest -q -m skipif test_rank1_ewc.py
    timeout 475 python -m results.bench --tricks --minutes 7 --to FOLDER

The plain way is what a reader of the paper would write first: a loop over samples, over tasks, over classes,
around diffusers' network and sampler where diffusers is installed. Each piece of work is done in both ways,
turn about, and what counts is the ratio of the median times. On a CPU the network is the digits'. On a GPU
it is the paper's, and ours trains and samples in bfloat16, its steps recorded, as in a run.
"""

import argparse
import copy
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import accumulate, product
from operator import or_
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

import rank1_ewc as r
from results.report import markdown

try:
    import diffusers
except ImportError:
    diffusers = None

NETWORK = "diffusers" if diffusers else "plain PyTorch"
SIZES = {  # settings of the script; on a GPU fewer images to generate than in a run
    "small": "--channels 8 --batch-size 8 --fisher-samples 20 --replay-per-class 5 --sample-steps 2",
    "cpu": "--fisher-samples 200",
    "cuda": "--dataset mnist --fisher-samples 128 --replay-per-class 100 --sample-steps 10",
}
RUNS = {  # whole runs of rank-1 EWC on digits: their settings, the first as in `make demo`, and our aims
    "a run of rank-1 EWC, 90 epochs": ("--epochs 90", 1.5),
    "the same, 10,000 samples a Fisher": ("--epochs 90 --fisher-samples 10000", 3),
}
VARIANTS = {"plain": "", "bf16": "--bf16", "accumulate 2": "--accumulate 2"}  # of short runs
AUTHORS = f"""- as the authors' code takes them: the network of {NETWORK}, images from a DataLoader, a penalty that is
  a sum over four old tasks; in a whole run also that sampler, and a Fisher in two passes over single
  gradients, in float64"""
TRICKS = {  # what each row sets otherwise than the row before
    "float32": {"precision": "float32", "repeatable": True},
    "TF32 in convolutions": {"precision": "TF32"},
    "bfloat16": {"precision": "bfloat16"},
    "recorded step": {"recorded": True},  # what a run does
    "cudnn.benchmark": {"benchmark": True},
    "not repeatable": {"repeatable": False},
    "channels_last": {"channels_last": True},
    "torch.compile": {"compile": "default"},
    "torch.compile, not channels_last": {"channels_last": False},
    "max-autotune-no-cudagraphs": {"compile": "max-autotune-no-cudagraphs"},
    "max-autotune and channels_last": {"channels_last": True},
}
NEED_CUDA = ("TF32 in convolutions", "recorded step", "cudnn.benchmark", "not repeatable")
COMPILED, SLOW = [*TRICKS][7:], [*TRICKS][9:]  # the slow ones may compile for minutes
RECORDED = {"recorded step": "only training steps are recorded"}
LEFT_OUT = {  # pieces of work, and the rows that they cannot have
    "training step": {},
    "sampling": RECORDED,
    "mu and c*": dict.fromkeys(COMPILED, "torch.compile has no second derivative")
    | {"bfloat16": "float32 alone, as mu all but cancels", **RECORDED},
}
COLUMNS = {  # of the table of tricks
    "turns": "how often it was measured, in turn with the others",
    "ms": "the median of the turns",
    "times as fast": "as the last row above it that was measured",
    "first s": "seconds of the first call, which compiles, records or searches",
    "of a product": "FLOP per second as a share of a large matrix product's",
    "GB": "the most memory of the GPU that it took",
    "difference": "from float32's: of the terms of steps, of images, of mu and c*",
}


class Bench:
    """What the pieces of work share: two untrained networks, a task of random images, and the lines."""

    def __init__(self, small: bool):
        self.small, self.gpu, self.lines = small, torch.cuda.is_available(), {}
        sizes = SIZES["small" if small else "cuda" if self.gpu else "cpu"]
        self.cfg = r.parse_args(["--method", "gd", *sizes.split()])
        self.device = r.set_up(self.cfg)
        self.steps, side = 3 if small else 10 if self.gpu else 20, 8 if self.cfg.dataset == "digits" else 32
        shape = self.steps * self.cfg.batch_size, 1, side, side
        generator = r.rng(self.device, "images")
        x = torch.randint(256, shape, generator=generator, device=self.device).to(torch.uint8)
        y = torch.arange(len(x), device=self.device) % 10
        self.task, self.replay = r.Data(x, y, x, y), (x.flip(0), y.flip(0))
        self.student = r.new_state(self.cfg, self.task, self.device).model
        self.cfg.seed = 1
        self.teacher = r.new_state(self.cfg, self.task, self.device).model.eval().requires_grad_(False)
        cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        self.on = {"device": torch.cuda.get_device_name() if self.gpu else cpu, "torch": torch.__version__}
        self.on |= {"dataset": self.cfg.dataset, "script": r.SCRIPT}

    def timed(self, way: Callable) -> tuple:
        """The seconds that way() takes, with what it left to the GPU, and its result."""
        started = time.perf_counter()
        result = way()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started, result

    def compare(self, name: str, plain: Callable, ours: Callable, aims: tuple, same_to: float | None) -> dict:
        """Do a piece of work both ways, turn about; keep the median seconds and the difference.

        aims: how many times as fast ours should be, on a CPU and on a GPU. same_to: the largest difference of
        the results that is allowed; None where ours is in bfloat16; plain then has PyTorch's defaults.
        """
        seconds = []
        for _ in range(2 if self.small else 4 if self.gpu else 6):
            torch.backends.cudnn.allow_tf32 = same_to is None
            torch.use_deterministic_algorithms(self.gpu and same_to is not None, warn_only=True)
            plain_s, plain_result = self.timed(plain)
            torch.backends.cudnn.allow_tf32 = False
            torch.use_deterministic_algorithms(self.gpu, warn_only=True)
            ours_s, our_result = self.timed(ours)
            seconds.append((plain_s, ours_s))
        medians = np.median(seconds[1:], axis=0).tolist()  # the first turn warms up
        return self.keep(name, *medians, aims[self.gpu], difference(plain_result, our_result), same_to)

    def keep(self, name: str, plain_s: float, ours_s: float, aim, apart: float, same_to) -> dict:
        """Print and keep a line."""
        ratio = plain_s / ours_s
        missed = "  missed" if aim and ratio < aim and not self.small else ""
        differs = "  NOT THE SAME" if same_to and apart > same_to else ""
        times = f"{plain_s:9.3g}{ours_s:9.3g}{ratio:7.1f}{aim or '-':>5}{apart:12.1e}"
        print(f"{name:55}{times}{missed}{differs}", flush=True)
        line = {"plain s": plain_s, "ours s": ours_s, "ratio": ratio, "aim": aim}
        self.lines[name] = line | {"difference": apart, "same to": same_to}
        return self.lines[name]

    def write(self, to: Path | None, name: str, content: dict, rows: list[dict], notes: list[str]) -> None:
        """NAME-<device>.json, and the rows and notes for people, .md, if there is a folder for them."""
        if to:
            path = to / f"{name}-{re.sub('[^A-Za-z0-9]+', '-', self.on['device'])}.json"
            r.write_json(path, self.on | content)
            on = "On a {device}, PyTorch {torch}, the network of {dataset}; script {script}."
            with r.whole(path.with_suffix(".md")) as file:
                file.write("\n".join([markdown(rows), on.format(**self.on), *notes, ""]).encode())


def difference(plain: float | Tensor | tuple, ours: float | Tensor | tuple) -> float:
    """The largest difference as a share of the largest value, of images the mean; of a tuple the worst."""
    if isinstance(plain, tuple):
        return max(difference(a, b) for a, b in zip(plain, ours))
    plain, ours = torch.as_tensor(plain), torch.as_tensor(ours)
    gap = (plain.double() - ours.double()).abs()
    gap = gap.mean() if plain.dtype == torch.uint8 else gap.max()
    return float(gap / plain.abs().max())


# ---- The plain way. It draws what ours draws, so that both end with the same numbers, but for rounding.


def plain_network(cfg: r.Settings, ours: nn.Module) -> nn.Module:
    """Diffusers' network with the weights of ours; without diffusers a copy of ours."""
    if not diffusers:
        return copy.deepcopy(ours)
    down, up = ["DownBlock2D"] * len(cfg.channels), ["UpBlock2D"] * len(cfg.channels)
    if len(cfg.channels) > 2:
        down[2], up[-3] = "AttnDownBlock2D", "AttnUpBlock2D"
    blocks = {"block_out_channels": cfg.channels, "down_block_types": down, "up_block_types": up}
    resampling = {"downsample_type": "resnet", "upsample_type": "resnet"}
    groups = max(8, cfg.channels[0] // 4)
    sizes = {"layers_per_block": cfg.layers_per_block, "norm_num_groups": groups, "num_class_embeds": 10}
    network = diffusers.UNet2DModel(in_channels=1, out_channels=1, **blocks, **resampling, **sizes)
    network.load_state_dict(ours.state_dict())
    network.register_forward_hook(lambda module, inputs, output: output.sample)  # a tensor, as ours returns
    return network.to(next(ours.parameters()).device).train(ours.training)


def picture_loader(x: Tensor, y: Tensor, size: int, order: list[int]) -> DataLoader:
    """Full batches of images in [-1, 1] and labels, by way of PIL images, as torchvision's datasets are."""
    arrays = x[:, 0].cpu().numpy()

    def collate(chosen):
        images = [2 * to_tensor(Image.fromarray(arrays[i])) - 1 for i in chosen]
        return torch.stack(images).to(x.device), y[chosen]

    return DataLoader(order, size, drop_last=True, collate_fn=collate)


def plain_batches(task: r.Data, replay: tuple | None, size: int, *when: int) -> Iterator[tuple]:
    """r.epoch_batches, its real images from a DataLoader."""
    device = task.x.device
    draw = {purpose: r.rng(device, when[0], purpose, *when[1:]) for purpose in ("order", "noise", "replay")}
    order = torch.randperm(len(task.x), generator=draw["order"], device=device).tolist()
    for images, labels in picture_loader(task.x, task.y, size, order):
        if replay:
            old = torch.randint(len(replay[1]), (size,), generator=draw["replay"], device=device)
            images = torch.cat([images, r.to_float(replay[0][old])])
            labels = torch.cat([labels, replay[1][old]])
        yield images, *r.draw_noise(images, draw["noise"]), labels


def plain_step(student, teacher, penalty, optimizer, batch: tuple, _=None) -> Tensor:
    """r.train_step."""
    x0, t, eps, y = batch
    x_t, half = r.add_noise(x0, t, eps), len(y) // 2 if teacher else len(y)
    distill = ewc = torch.zeros(())
    eps_student = student(x_t, t, y)
    denoise = F.mse_loss(eps_student[:half], eps[:half])
    if teacher:
        with torch.no_grad():
            eps_teacher = teacher(x_t[half:], t[half:], y[half:])
        distill = F.mse_loss(eps_student[half:], eps_teacher)
    if penalty:
        ewc = penalty(student)
    optimizer.zero_grad()
    (denoise + distill + ewc).backward()
    optimizer.step()
    return torch.tensor([term.item() for term in (denoise, distill, ewc)])


class PlainPenalty(r.Penalty):
    """r.Rank1Penalty as a sum over the old tasks, of each (mu, c*, theta*), the vectors in float64."""

    def __init__(self, lam: float):
        super().__init__(lam)
        self.tasks = []

    def add(self, fisher: tuple, weights: nn.Module | Tensor) -> dict:
        theta_star = r.flat(r.trainable(weights)).detach().double()
        self.tasks.append((fisher[0].double(), fisher[1], theta_star))
        return {}

    def drift(self, weights: nn.Module | Tensor) -> Tensor:
        theta = r.flat(r.trainable(weights)).double()
        return torch.stack([mu @ (theta - theta_star) for mu, _, theta_star in self.tasks])

    def __call__(self, weights: nn.Module | Tensor) -> Tensor:
        if not self.tasks:
            return torch.zeros(())
        return self.lam / 2 * sum(c * d**2 for (_, c, _), d in zip(self.tasks, self.drift(weights)))


def one_by_one(model, x, y, n, generator) -> Iterator[Tensor]:
    """The gradient of each of n samples, in float64."""
    for batch in r.fisher_batches(x, y, n, generator):
        for i in range(len(batch[0])):
            loss = r.per_sample_loss(model, *[v[i : i + 1] for v in batch]).mean()
            yield r.flat(torch.autograd.grad(loss, model.parameters())).double()


def plain_rank1(*given, shared=False) -> tuple[Tensor, Tensor]:
    """r.rank1_fisher: mu, and in a second pass over fresh draws c*."""
    mu = sum(one_by_one(*given)) / given[3]
    energy = sum((mu @ g) ** 2 for g in one_by_one(*given)) / given[3]
    return mu, energy / (mu @ mu) ** 2


def plain_diagonal(*given) -> Tensor:
    """r.diagonal_fisher."""
    return sum(g**2 for g in one_by_one(*given)) / given[3]


@torch.no_grad()
def plain_images(cfg, network: nn.Module, noise: Tensor, y: Tensor, _: str, steps=None) -> Tensor:
    """r.sample_images by diffusers' sampler, 200 at a time, but no two classes of a replay pool together."""
    network.eval()
    size, images = min(200, len(noise)), []
    for x, labels in zip(noise.repeat(len(y) // len(noise), 1, 1, 1).split(size), y.split(size)):
        if diffusers:
            scheduler = diffusers.DDIMScheduler()
            scheduler.set_timesteps(steps or cfg.sample_steps)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t, labels), t, x).prev_sample
        else:
            x = r.ddim_sample(network, x, labels, steps or cfg.sample_steps)
        images.append(r.to_uint8(x))
    return torch.cat(images)


def plain_distance(a: np.ndarray, b: np.ndarray) -> float:
    """r.frechet_distance: clean-fid's, by a matrix square root, without its warnings."""
    import cleanfid.fid

    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        return cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def plain_run() -> None:
    """rank1_ewc.py as a program, every part of a run of rank-1 EWC taken the plain way."""
    ours = r.new_state

    def new_state(cfg, *given):
        state = ours(cfg, *given)
        state.model = plain_network(cfg, state.model)
        return state

    parts = {"epoch_batches": plain_batches, "train_step": plain_step, "sample_images": plain_images}
    parts |= {"frechet_distance": plain_distance, "new_state": new_state}
    r.METHODS["rank1"] = r.Method(replay=True, distill=True, fisher=plain_rank1, penalty=PlainPenalty)
    with mock.patch.multiple(r, **parts):
        r.main()


# ---- The pieces of work, each the plain way and ours.


def both_penalties(bench: Bench, tasks: int) -> tuple[PlainPenalty, r.Rank1Penalty]:
    """The penalty after so many tasks."""
    penalties, generator = (PlainPenalty(1.0), r.Rank1Penalty(1.0)), r.rng(bench.device, "penalty")
    theta = r.flat(bench.student.parameters()).detach()
    for _ in range(tasks):
        mu, step = torch.randn(2, len(theta), generator=generator, device=bench.device)
        for penalty in penalties:
            penalty.add((mu, theta.new_tensor(1e-6)), theta + 0.01 * step)
    return penalties


def bench_training(bench: Bench) -> None:
    """Steps with replay and distillation; leaves the seconds of one of ours to the bench.

    First without a penalty on the same batches; then as the authors' code takes them in the last of five
    tasks, with a DataLoader, and a penalty that is a sum over four old tasks.
    """
    cfg, start, own = bench.cfg, copy.deepcopy(bench.student.state_dict()), (bench.student, bench.teacher)
    theirs = [plain_network(cfg, network) for network in own]

    def taken(step, batches_of, networks, penalty, fused=None):
        networks[0].load_state_dict(start)
        optimizer = torch.optim.Adam(networks[0].parameters(), lr=cfg.lr, fused=fused)
        batches = batches_of(bench.task, bench.replay, cfg.batch_size, cfg.seed, 1, 0)
        return torch.stack([step(*networks, penalty, optimizer, batch) for batch in batches]).cpu()

    def compare(name, same_to, batches_of, penalties):
        step = partial(r.train_step, gradient_of=r.gradient_function(cfg))
        plain = partial(taken, plain_step, batches_of, theirs, penalties[0])
        ours = partial(taken, step, r.epoch_batches, own, penalties[1], bench.gpu or None)
        return bench.compare(name, plain, ours, (1.2, 3), None if cfg.bf16 else same_to)

    name = f"{bench.steps} training steps ({NETWORK})"
    bench.step_seconds = compare(name, 1e-3, r.epoch_batches, (None, None))["ours s"] / bench.steps
    # A PIL image's pixels are rounded otherwise, and Adam's first steps enlarge the smallest differences.
    compare("the same, as the authors' code takes them", 5e-2, plain_batches, both_penalties(bench, 4))


def bench_pool(bench: Bench) -> None:
    """The replay pool of the last task, from the same noise."""
    cfg, given = bench.cfg, (bench.task.x.shape[1:], 10 - 10 // bench.cfg.tasks)
    teacher, same_to = plain_network(cfg, bench.teacher), None if cfg.bf16 else 1e-3

    @mock.patch.object(r, "sample_images", plain_images)
    def plain():
        return r.replay_pool(cfg, teacher, *given)

    ours = partial(r.replay_pool, cfg, bench.teacher, *given)
    bench.compare(f"sampling the replay pool ({NETWORK})", plain, ours, (1.3, 3), same_to)


def bench_fisher(bench: Bench) -> None:
    """The Fisher of a task."""
    model, images = copy.deepcopy(bench.student).eval(), (*bench.task[:2], bench.cfg.fisher_samples)
    of = lambda fisher: lambda: fisher(model, *images, r.rng(bench.device, "fisher"))
    bench.compare("mu and c* of a task", of(plain_rank1), of(r.rank1_fisher), (10, 30), 1e-4)
    bench.compare("diagonal of F", of(plain_diagonal), of(r.diagonal_fisher), (4, 15), 1e-4)


def bench_penalty(bench: Bench) -> None:
    """The penalty after 19 tasks and its gradient, and the memory that it keeps."""
    plain, ours = both_penalties(bench, 19)
    theta = r.flat(bench.student.parameters()).detach().requires_grad_()
    ways = [lambda of=of: torch.autograd.grad(of(theta), theta)[0] for of in (plain, ours)]
    line = bench.compare("penalty and its gradient after 19 tasks", *ways, (None, None), 1e-4)
    line["plain MB"] = sum(v.nbytes for task in plain.tasks for v in task) / 2**20
    line["ours MB"] = sum(v.nbytes for v in vars(ours).values() if torch.is_tensor(v)) / 2**20
    line["share of a step"], share = line["ours s"] / bench.step_seconds, line["ours MB"] / line["plain MB"]
    print(f"    keeps {share:.2f} of the memory (aim: a third)" + ("  missed" if share > 1 / 3 else ""))


def bench_reading(bench: Bench) -> None:
    """A task's images once, in batches on the device: plain is a DataLoader."""
    n, size = 600 if bench.small else 12_000, bench.cfg.batch_size
    x = torch.randint(200, (n, 1, 32, 32), device=bench.device).to(torch.uint8)
    loader, batches = picture_loader(x, x[:, 0, 0, 0], size, range(n)), x[: n // size * size].split(size)
    plain = lambda: torch.stack([images.mean() for images, _ in loader])
    ours = lambda: torch.stack([r.to_float(images).mean() for images in batches])
    bench.compare(f"reading a task's {n:,} images once", plain, ours, (20, 20), 1e-4)


def bench_frechet_distance(bench: Bench) -> None:
    images, features = (200, 64) if bench.small else (2000, 2048)
    a, b = np.random.default_rng(0).normal(size=(2, images, features)) ** 2  # never negative, as Inception's
    ways = partial(plain_distance, a, b + 0.1), partial(r.frechet_distance, a, b + 0.1)
    bench.compare(f"Frechet distance, {features} features, {images} images a side", *ways, (15, 10), 1e-3)


# ---- Whole runs, each in a process of its own.

OURS, PLAIN = [r.__file__], ["-c", "from results import bench; bench.plain_run()"]


def in_a_process(program: list[str], flags: str) -> dict:
    """A run, on a CPU unless flags say otherwise. -> its result.json, and what the process took up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *program, "--device", "cpu", *flags.split(), "--out", folder]
        # Two threads of a BLAS would wait for each other where another program keeps a core busy.
        options = {"cwd": Path(r.__file__).parent, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **options, **quiet)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"try it by hand: {' '.join(command)}")
        result = json.loads(Path(folder, "result.json").read_text())
        result["checkpoint MB"] = Path(folder, "checkpoint.pt").stat().st_size / 2**20
    return result | {"memory MB": usage.ru_maxrss / 2**10}


def bench_runs(bench: Bench) -> None:
    """Five tasks of digits, from the first step to the last FID."""
    for name, (flags, aim) in [*RUNS.items()][: 1 if bench.small else None]:
        flags = f"{SIZES['small']} --epochs 1" if bench.small else flags
        plain, ours = (in_a_process(program, flags) for program in (PLAIN, OURS))
        seconds = [sum(result["seconds"].values()) for result in (plain, ours)]
        line = bench.keep(name, *seconds, aim, difference(plain["afid"][-1], ours["afid"][-1]), 0.1)
        line["parts"] = {part: [plain["seconds"][part], s] for part, s in ours["seconds"].items()}


def short_runs(bench: Bench) -> dict[str, list[float]]:
    """The final AFID of short runs, seeds 0 to 2: no variant should move it further than other seeds do."""
    short = f"--device {bench.device.type} --epochs 27 --replay-per-class 50 --no-bf16"
    afid = lambda flags, seed: in_a_process(OURS, f"{short} {flags} --seed {seed}")["afid"][-1]
    return {variant: [afid(flags, seed) for seed in range(3)] for variant, flags in VARIANTS.items()}


def milliseconds_by_threads(bench: Bench) -> dict[str, float]:
    """A training step in one thread and in two, on idle cores and beside a process that keeps one busy."""
    step, medians = a_training_step(bench), {}
    busy = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # it ends with the bench
    for beside, program in {"idle cores": "", "one busy": busy}.items():
        other = subprocess.Popen([sys.executable, "-c", program])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seconds = [bench.timed(step)[0] for _ in range(53)][3:]
            medians[f"{beside}, threads {threads}"] = 1000 * float(np.median(seconds))
        other.kill()
        other.wait()
    return medians


def growth(bench: Bench, to: Path | None, counts: tuple = (2, 5, 10), epochs: int = 27) -> dict:
    """What a run costs as its ten classes come in more tasks: print, draw and write it."""
    rows, shares, step = [], {}, a_training_step(bench)
    for method, tasks in product(("gd", "diag", "rank1"), counts):
        flags = f"--method {method} --tasks {tasks} --epochs {epochs} --fisher-samples 1000"
        result, cfg = in_a_process(OURS, flags), r.parse_args(flags.split())
        stages = r.split_tasks(r.load_data("digits", cfg.data_dir), tasks)
        row = {"method": method, "tasks": tasks, "steps": sum(r.steps_of(cfg, stage)[1] for stage in stages)}
        rows.append(row | {name: result[name] for name in ("checkpoint MB", "memory MB", "seconds")})
        print(json.dumps(rows[-1]), flush=True)
    for tasks in counts:  # what share of a training step of the last task the penalty and its gradient take
        _, penalty = both_penalties(bench, tasks - 1)
        parts = step, lambda penalty=penalty: penalty(bench.student).backward()
        seconds = [[bench.timed(part)[0] for part in parts] for _ in range(100)]
        without, extra = np.median(seconds, axis=0).tolist()
        shares[tasks] = extra / (without + extra)
        print(f"rank-1's share of a training step in the last of {tasks} tasks: {shares[tasks]:.1%}")
    content = {"epochs": epochs, "runs": rows, "rank-1's share of a step": shares, "script": r.SCRIPT}
    if to:
        r.write_json(to / "growth.json", content)
        plot_growth(rows, counts, to / "growth.png")
    return content


def plot_growth(rows: list[dict], counts: tuple, path: Path) -> None:
    """Memory and checkpoint of each method, and the seconds of rank1's parts, over the number of tasks."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    of = lambda name, method: [row[name] for row in rows if row["method"] == method]
    panels = {
        f"{name} ({when})": {method: of(name, method) for method in ("gd", "diag", "rank1")}
        for name, when in {"memory MB": "of the process", "checkpoint MB": "after the last task"}.items()
    }
    parts = ("train", "replay", "fisher", "fid")
    panels["seconds of the whole run (rank1)"] = {p: [s[p] for s in of("seconds", "rank1")] for p in parts}
    for axes, (title, curves) in zip(figure.subplots(1, 3), panels.items()):
        for name, values in curves.items():
            axes.plot(counts, values, "o-", label=name)
        axes.set(xlabel="tasks that the ten classes come in", ylabel=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # below: it covers no data
    with r.whole(path) as file:
        figure.savefig(file, dpi=120)


# ---- What makes a GPU faster. What the script has no setting for is set from outside.


def matrix_product_speed(bench: Bench, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product."""
    side = 512 if bench.small else 8192 if bench.gpu else 2048
    square = torch.randn(side, side, device=bench.device).to(dtype)
    return 2 * side**3 / min(bench.timed(lambda: square @ square)[0] for _ in range(20))


def flop_of(work: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def networks_with(bench: Bench, tricks: dict) -> tuple:
    """Student, teacher and optimizer."""
    networks = [copy.deepcopy(network) for network in (bench.student, bench.teacher)]
    optimizer = torch.optim.Adam(networks[0].parameters(), lr=bench.cfg.lr, fused=bench.gpu or None)

    def in_the_weights_format(optimizer, *_):  # as a fused Adam wants the gradients
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.empty_like(p).copy_(p.grad)

    if tricks.get("channels_last"):
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
        optimizer.register_step_pre_hook(in_the_weights_format)
    if mode := tricks.get("compile"):
        networks = [torch.compile(network, mode=mode, dynamic=False) for network in networks]
    return *networks, optimizer


def ways_with(bench: Bench, work: str, tricks: dict, student, teacher, optimizer) -> tuple:
    """Two functions, the piece of work and a short one to warm it up, and how often a turn times it."""
    cfg, (x, y, *_) = copy.copy(bench.cfg), bench.task
    cfg.bf16, cfg.cuda_graph = tricks["precision"] == "bfloat16", "recorded" in tricks
    if work == "training step":
        batch = next(r.epoch_batches(bench.task, bench.replay, cfg.batch_size, cfg.seed, 1, 0))
        step = partial(r.train_step, student, teacher, None, optimizer, batch, r.gradient_function(cfg))
        return step, step, bench.steps
    if work == "sampling":
        y = y[: cfg.batch_size if bench.small else 1000]
        noise = torch.randn(len(y), *x.shape[1:], generator=r.rng(y.device), device=y.device)
        sample = partial(r.sample_images, cfg, teacher, noise, y, work)
        return partial(sample, 10), partial(sample, 1), 1
    fisher = lambda n: r.rank1_fisher(student, x, y, n, r.rng(y.device, "fisher"))
    return partial(fisher, len(y)), partial(fisher, len(y) // 10), 1


def set_flags(bench: Bench, tricks: dict) -> None:
    torch.backends.cudnn.allow_tf32 = tricks["precision"] == "TF32"
    torch.backends.cudnn.benchmark = "benchmark" in tricks
    torch.use_deterministic_algorithms(bench.gpu and tricks["repeatable"], warn_only=True)


def a_training_step(bench: Bench) -> Callable:
    return ways_with(bench, "training step", TRICKS["float32"], *networks_with(bench, TRICKS["float32"]))[0]


def measure(bench: Bench, row: dict, tricks: dict, held: dict) -> None:
    """A turn of a row. held: by row its networks, by piece of work what the first row found, and its FLOP."""
    work, name = key = row["piece of work"], row["row"]
    set_flags(bench, tricks)
    if bench.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if bench.gpu else 0
    held[key] = held.get(key) or networks_with(bench, tricks)
    do, warm_up, times = ways_with(bench, work, tricks, *held[key])
    first_s, _ = bench.timed(warm_up)
    seconds, found = zip(*(bench.timed(do) for _ in range(times)))
    row["ms"].append(1000 * float(np.median(seconds)))
    if len(row["ms"]) == 1:
        row["first s"] = first_s
        row["GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9 if bench.gpu else None
        if name == "float32":
            held[work] = found, flop_of(do)
        exact, row["FLOP"] = held.get(work, (None, None))
        row["difference"] = difference(exact, found) if exact else None
        if exact and not math.isfinite(row["difference"]):
            row["difference"] = None
            raise FloatingPointError("the result is not finite")


def bench_tricks(bench: Bench, to: Path | None, minutes: float) -> dict[str, dict]:
    """Each piece of work with each row's tricks, turn about; after each row all is written, as far as it is.

    A row that fails is noted, and the next goes on. After so many minutes none begins. The last two, which
    may compile for minutes, come after everything else, and after another turn of the row before them.
    """
    end, turns, held = time.monotonic() + 60 * minutes, 1 if bench.small else 3, {}
    peak = max(matrix_product_speed(bench, dtype) for dtype in (torch.float32, torch.bfloat16))
    notes, rows = {} if bench.gpu else dict.fromkeys(NEED_CUDA, "needs CUDA"), {}
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        notes |= dict.fromkeys(COMPILED, "needs a C++ compiler")
    for work, name in product(LEFT_OUT, TRICKS):
        note = (notes | LEFT_OUT[work]).get(name)
        rows[work, name] = {"piece of work": work, "row": name, "ms": [], "note": note}
    sets = accumulate(({} if name in notes else TRICKS[name] for name in TRICKS), or_)
    names, sets = [*TRICKS], dict(zip(TRICKS, sets))
    torch._dynamo.config.recompile_limit = 64  # beyond it a network is not compiled
    for part in (names[: -len(SLOW)], names[-len(SLOW) - 1 :]):
        for work, _, name in product(LEFT_OUT, range(turns), part):
            row = rows[work, name]
            if row["note"] or time.monotonic() > end:
                continue
            try:
                measure(bench, row, sets[name], held)
            except Exception as error:  # noqa: BLE001
                row["note"] = " ".join(f"failed: {type(error).__name__}: {error}".split())[:120]
                held.pop((work, name), None)
            print(f"{work:16}{name:35}", row["note"] or f"{row['ms'][-1]:.4g} ms", flush=True)
            content = {"FLOP/s of a matrix product": peak} | {", ".join(key): rows[key] for key in rows}
            bench.write(to, "tricks", content, *tricks_table([*rows.values()], peak))
    set_flags(bench, TRICKS["float32"])
    return rows


def tricks_table(rows: list[dict], peak: float) -> tuple[list[dict], list[str]]:
    """The rows for people, and what the columns mean."""
    table, last = [], {}
    for row in rows:
        line = {"piece of work": row["piece of work"], "row": row["row"]} | dict.fromkeys(COLUMNS)
        if row["ms"]:
            ms = float(np.median(row["ms"]))
            faster = last.get(row["piece of work"], ms) / ms
            line |= {"turns": len(row["ms"]), "ms": f"{ms:.4g}", "times as fast": f"{faster:.2f}"}
            line |= {"first s": f"{row['first s']:.2g}", "GB": row["GB"]}
            line["of a product"] = row["FLOP"] and f"{row['FLOP'] / ms * 1000 / peak:.1%}"
            line["difference"] = f"{row['difference']:.0e}" if row["difference"] is not None else None
            last[row["piece of work"]] = ms
        table.append(line | {"note": row["note"] or (None if row["ms"] else "not reached")})
    notes = [f"- {name}: {meaning}" for name, meaning in COLUMNS.items()]
    return table, [*notes, f"- a large matrix product: {peak / 1e12:.3g} TFLOP/s"]


# ---- What is printed and written.


def as_table(content: dict, lines: dict[str, dict]) -> tuple[list[dict], list[str]]:
    """The lines of a bench for people, and what else it measured."""
    rows, notes = [], ["- training steps, sampling: both ways compute the same convolutions", AUTHORS]
    for name, line in lines.items():
        missed = line["aim"] and line["ratio"] < line["aim"]
        seconds = {column: f"{line[column]:.3g}" for column in ("plain s", "ours s")}
        ratio = {"ratio": f"{line['ratio']:.1f}" + (" (missed)" if missed else "")}
        ratio["aim"] = line["aim"] and f"{line['aim']:g}"
        rows.append({"piece of work": name} | seconds | ratio | {"difference": f"{line['difference']:.0e}"})
        parts = "; ".join(f"{part} {a:.1f}, {b:.1f}" for part, (a, b) in line.get("parts", {}).items())
        notes += [f"- {name}, seconds of plain and ours: {parts}"] if parts else []
    if "training step" in content:
        share = content["training step"]["share"]
        notes.append(f"- a training step reaches {share:.0%} of the speed of a large matrix product")
    for name in ("ms of a training step", "AFID of short runs"):
        for key, value in content.get(name, {}).items():
            values = value if isinstance(value, list) else [value]
            notes.append(f"- {name}, {key}: {', '.join(f'{v:.0f}' for v in values)}")
    notes += [f"- {name} failed: {why}" for name, why in content.get("failed", {}).items()]
    return rows, notes


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Print a line for each piece of work, write them, and return them by name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="small sizes, no short runs: to try it")
    parser.add_argument("--to", type=r.folder, help="folder to write into (default: results/pages/cost)")
    parser.add_argument("--growth", action="store_true", help="what more tasks cost, and nothing else")
    parser.add_argument("--tricks", action="store_true", help="what makes a GPU faster, and nothing else")
    parser.add_argument("--minutes", type=float, default=60, help="after so many no row of --tricks begins")
    given = parser.parse_args(argv)
    r.QUIET, bench = True, Bench(given.small)
    to = given.to or (None if given.small else Path(__file__).parent / "pages" / "cost")
    if given.growth:
        return growth(bench, to)
    print(", ".join(bench.on.values()), flush=True)
    if given.tricks:
        return bench_tricks(bench, to, given.minutes)
    print(f"\n{'':57}plain s   ours s  ratio  aim  difference")
    content = {"failed": {}}
    parts = [bench_training, bench_pool, bench_fisher, bench_penalty, bench_reading, bench_frechet_distance]
    for part in parts if bench.gpu else [*parts, bench_runs]:  # first what was missed
        try:
            part(bench)
        except Exception as error:  # noqa: BLE001
            content["failed"][part.__name__] = f"{type(error).__name__}: {error}"
            print(part.__name__, "failed:", error)
        bench.write(to, "bench", content | bench.lines, *as_table(content, bench.lines))
    if not given.small:
        peak = matrix_product_speed(bench, torch.bfloat16 if bench.cfg.bf16 else torch.float32)
        flop, seconds = flop_of(a_training_step(bench)), bench.step_seconds
        speeds = {"seconds": seconds, "GFLOP": flop / 1e9, "peak GFLOP/s": peak / 1e9}
        content["training step"] = speeds | {"share": flop / seconds / peak}
        content["ms of a training step"] = {} if bench.gpu else milliseconds_by_threads(bench)
        content["AFID of short runs"] = short_runs(bench)
        bench.write(to, "bench", content | bench.lines, *as_table(content, bench.lines))
    print("\n".join(as_table(content, bench.lines)[1]))
    return bench.lines


if __name__ == "__main__":
    main()
