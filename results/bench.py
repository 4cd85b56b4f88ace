"""How much faster is this project's code than a plain implementation, and do both agree?

    python -m results.bench            # half an hour on two cores: bench-<device>.json, .md
    python -m results.bench --growth   # what runs of 2, 5 and 10 tasks cost: growth.json, .png

Both write into results/pages/cost, or into the folder --to. --small tries the first with small
sizes, and writes into runs/bench.

The plain way is what a reader of the paper would write first: loops over samples, tasks and
classes, around diffusers' network and sampler if diffusers is installed. The two ways take turns
at each piece of work, and the ratio of their median times is reported. On a CPU the network is that
of the digits. On a GPU it is the paper's, and our way trains and samples in bfloat16, as runs do.
"""

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

import rank1_ewc as r
from results.report import PAGES, markdown, save, write_text

try:
    import diffusers
except ImportError:
    diffusers = None

NETWORK = "diffusers" if diffusers else "plain PyTorch"
SIZES = {  # flags of the script; on a GPU fewer generated images than in a run
    "small": "--channels 8 --batch-size 8 --fisher-samples 9 --replay-per-class 5 --sample-steps 2",
    "cpu": "--fisher-samples 200",
    "cuda": "--dataset mnist --fisher-samples 128 --replay-per-class 100 --sample-steps 10",
}
RUNS = {  # whole runs of rank-1 EWC on digits: flags (the first: `make demo`), ratio aimed at
    "a run of rank-1 EWC, 90 epochs": ("--epochs 90", 1.5),
    "the same, 10,000 samples a Fisher": ("--epochs 90 --fisher-samples 10000", 3),
}
NOTES = f"""On a {{device}}, PyTorch {{torch}}, the network of {{dataset}}; script {{script}}.
- training steps, sampling: both ways compute the same convolutions
- as the authors' code takes them: the network of {NETWORK}, images from a DataLoader, a penalty
  that is a sum over four old tasks; in a whole run also that sampler, and a Fisher in two passes
  over single gradients, in float64"""


class Bench:
    """What the pieces of work share: two untrained networks, random images, the table's lines."""

    def __init__(self, small: bool):
        self.small = small
        self.gpu = torch.cuda.is_available()
        size = "cuda" if self.gpu else "cpu"
        cfg = r.parse_args(["--method", "gd", *SIZES["small" if small else size].split()])
        self.cfg = cfg
        self.device = r.set_up(cfg)
        self.steps = 3 if small else 20
        side = 8 if cfg.dataset == "digits" else 32
        shape = (self.steps * cfg.batch_size, 1, side, side)
        torch.manual_seed(0)
        x = torch.randint(256, shape, dtype=torch.uint8, device=self.device)
        y = torch.arange(len(x), device=self.device) % 10
        self.task = r.Data(x, y, x, y)
        self.pool = (x, y)  # the replayed images
        self.student = r.UNet(1, 10, cfg.channels, cfg.layers_per_block).to(self.device)
        self.teacher = r.UNet(1, 10, cfg.channels, cfg.layers_per_block).to(self.device)
        self.teacher.eval().requires_grad_(False)
        self.theta = r.flat(self.student.parameters()).detach()
        self.lines = {}
        self.notes = []
        cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        self.on = {
            "device": torch.cuda.get_device_name() if self.gpu else cpu,
            "torch": torch.__version__,
            "dataset": cfg.dataset,
            "script": r.SCRIPT,
        }

    def timed(self, way: Callable) -> tuple:
        """The seconds that way() takes, including its work on the GPU, and its result."""
        started = time.perf_counter()
        result = way()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started, result

    def compare(self, name: str, plain: Callable, ours: Callable, aims: tuple, same_to) -> None:
        """Do a piece of work in both ways by turns; keep the median seconds and the difference.

        aims: how many times as fast ours should be, on a CPU and on a GPU. same_to: the largest
        difference that the results may have; None where ours are in bfloat16.
        """
        seconds = []
        for _ in range(2 if self.small else 6):
            if same_to is None:  # PyTorch's defaults, for the plain way
                torch.backends.cudnn.allow_tf32 = True
                torch.use_deterministic_algorithms(False)
            plain_s, plain_result = self.timed(plain)
            r.set_up(self.cfg)  # as in a run
            our_s, our_result = self.timed(ours)
            seconds.append((plain_s, our_s))
        medians = np.median(seconds[1:], axis=0).tolist()  # the first turn warms up
        self.keep(name, *medians, aims[self.gpu], difference(plain_result, our_result), same_to)

    def keep(self, name, plain_s, our_s, aim, apart, same_to) -> None:
        """Keep and print a line."""
        self.lines[name] = {
            "plain s": plain_s,
            "ours s": our_s,
            "ratio": plain_s / our_s,
            "aim": aim,
            "difference": apart,
            "same to": same_to,
        }
        times = f"{plain_s:.3g} s and {our_s:.3g} s"
        print(f"{name}: {times}, difference {apart:.1g}", flush=True)

    def write(self, to: Path) -> None:
        """Write bench-<device>.json, and the same as a table, bench-<device>.md."""
        device = re.sub("[^A-Za-z0-9]+", "-", self.on["device"])
        path = to / f"bench-{device}.json"
        r.write_json(path, self.on | self.lines)
        table = pd.DataFrame(self.lines.values(), [*self.lines])
        table = table.map("{:.3g}".format, na_action="ignore")
        table = markdown(table.reset_index(names="piece of work"))
        text = "\n".join([table, NOTES.format(**self.on), *self.notes, ""])
        write_text(path.with_suffix(".md"), text)


def difference(plain, ours) -> float:
    """The largest difference, for images the mean, over the largest value; the worst of a tuple."""
    if isinstance(plain, tuple):
        return max(difference(a, b) for a, b in zip(plain, ours))
    plain = torch.as_tensor(plain)
    gap = (plain.double() - torch.as_tensor(ours).double()).abs()
    gap = gap.mean() if plain.dtype == torch.uint8 else gap.max()
    return float(gap / plain.abs().max())


# ---- The plain way. Both ways draw the same random numbers, so results differ only by rounding.


def plain_network(cfg, ours: nn.Module) -> nn.Module:
    """Diffusers' network with our weights; without diffusers a copy of our network."""
    if not diffusers:
        return copy.deepcopy(ours)
    down = ["DownBlock2D"] * len(cfg.channels)
    up = ["UpBlock2D"] * len(cfg.channels)
    if len(cfg.channels) > 2:
        down[2] = "AttnDownBlock2D"
        up[-3] = "AttnUpBlock2D"
    network = diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=cfg.channels,
        down_block_types=down,
        up_block_types=up,
        downsample_type="resnet",
        upsample_type="resnet",
        layers_per_block=cfg.layers_per_block,
        norm_num_groups=ours.conv_norm_out.num_groups,
        num_class_embeds=10,
    )
    network.load_state_dict(ours.state_dict())
    network.register_forward_hook(lambda module, inputs, output: output.sample)  # a tensor, as ours
    return network.to(next(ours.parameters()).device).train(ours.training)


class Pictures(Dataset):
    """Images in [-1, 1] and labels, made from PIL images as in torchvision's datasets."""

    def __init__(self, x: Tensor, y: Tensor):
        self.arrays = x[:, 0].cpu().numpy()
        self.labels = y.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.arrays[i])
        return 2 * to_tensor(picture) - 1, self.labels[i]


def plain_batches(task: r.Data, replay: tuple | None, size: int, seed: int, *place: int):
    """r.epoch_batches with real images from a DataLoader."""
    device = task.x.device
    purposes = ("order", "noise", "replay")
    orders, noises, replays = [r.rng(device, seed, purpose, *place) for purpose in purposes]
    order = torch.randperm(len(task.x), generator=orders, device=device).tolist()
    loader = DataLoader(Pictures(task.x, task.y), size, sampler=order, drop_last=True)
    for images, labels in loader:
        x0 = images.to(device)
        y = labels.to(device)
        if replay:
            old_x, old_y = replay
            old = torch.randint(len(old_y), (size,), generator=replays, device=device)
            x0 = torch.cat([x0, r.to_float(old_x[old])])
            y = torch.cat([y, old_y[old]])
        yield x0, *r.draw_noise(x0, noises), y


class PlainPenalty:
    """r.Rank1Penalty as a sum over old tasks, in float64; each task keeps (mu, c*, theta*)."""

    def __init__(self, lam: float):
        self.lam = lam
        self.tasks = []

    def add(self, fisher: tuple[Tensor, Tensor], theta: Tensor) -> dict:
        mu, c_star = fisher
        self.tasks.append((mu.double(), c_star, theta.detach().double()))
        return {}

    def drift(self, theta: Tensor) -> Tensor:
        return theta.new_zeros(1)  # fills a field of result.json that is not read here

    def __call__(self, theta: Tensor) -> Tensor:
        total = theta.new_zeros(())
        theta = theta.double()
        for mu, c_star, theta_star in self.tasks:
            total = total + c_star * (mu @ (theta - theta_star)) ** 2
        return self.lam / 2 * total


def single_gradients(model, batches: Iterator[tuple]) -> Iterator[Tensor]:
    """Per-sample gradients by one backward pass each, in float64."""
    for batch in batches:
        for i in range(len(batch[0])):
            sample = [v[i : i + 1] for v in batch]
            loss = r.per_sample_loss(model, *sample).mean()
            yield r.flat(torch.autograd.grad(loss, model.parameters())).double()


def plain_rank1(model, x, y, n, generator) -> tuple[Tensor, Tensor]:
    """r.rank1_fisher: mu, then c* in a second pass over fresh draws."""
    batches = r.fisher_batches(x, y, n, generator)
    mu = sum(single_gradients(model, batches)) / n
    batches = r.fisher_batches(x, y, n, generator)
    energy = sum((mu @ g) ** 2 for g in single_gradients(model, batches)) / n
    return mu, energy / (mu @ mu) ** 2


def plain_diagonal(model, x, y, n, generator) -> Tensor:
    """r.diagonal_fisher with the same batch size, on which the draws depend."""
    D = len(r.flat(model.parameters()))
    size = max(1, min(r.FISHER_BATCH, r.GRADIENT_FLOATS // D))
    batches = r.fisher_batches(x, y, n, generator, size=size)
    return sum(g**2 for g in single_gradients(model, batches)) / n


@torch.no_grad()
def plain_images(cfg, model, noise: Tensor, y: Tensor, steps: int, name: str) -> Tensor:
    """r.sample_images with diffusers' sampler, in batches of 200 or, in a replay pool, a class."""
    model.eval()
    size = min(200, len(noise))
    noise = noise.repeat(len(y) // len(noise), 1, 1, 1)
    images = []
    for x, labels in zip(noise.split(size), y.split(size)):
        if diffusers:
            scheduler = diffusers.DDIMScheduler()
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t, labels), t, x).prev_sample
        else:
            x = r.ddim_sample(model, x, labels, steps)
        images.append(r.to_uint8(x))
    return torch.cat(images)


def plain_distance(a: np.ndarray, b: np.ndarray) -> float:
    """r.frechet_distance as in clean-fid, by a matrix square root."""
    import cleanfid.fid

    return cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def plain_run() -> None:
    """Run rank1_ewc.py with the parts of rank-1 EWC replaced by the plain way."""
    our_state = r.new_state

    def plain_state(cfg, data, device):
        state = our_state(cfg, data, device)
        state.model = plain_network(cfg, state.model)
        return state

    r.new_state = plain_state
    r.epoch_batches = plain_batches
    r.sample_images = plain_images
    r.frechet_distance = plain_distance
    plain = {"fisher": plain_rank1, "penalty": PlainPenalty}
    r.METHODS["rank1"] = r.Method(replay=True, distill=True, **plain)
    r.main()


# ---- The pieces of work, each in the plain way and in ours.


def both_penalties(bench: Bench, tasks: int) -> tuple[PlainPenalty, r.Rank1Penalty]:
    """The penalty after this many tasks, in both ways."""
    plain = PlainPenalty(1.0)
    ours = r.Rank1Penalty(1.0)
    for _ in range(tasks):
        mu = torch.randn_like(bench.theta)
        theta_star = bench.theta + 0.01 * torch.randn_like(bench.theta)
        for penalty in (plain, ours):
            penalty.add((mu, mu.new_tensor(1e-6)), theta_star)
    return plain, ours


def bench_training(bench: Bench) -> None:
    """Steps with replay and distillation, first on the same batches and without a penalty.

    Then as the authors' code takes them in the last of five tasks: with a DataLoader, and a penalty
    that is a sum over four old tasks.
    """
    cfg = bench.cfg
    own = (bench.student, bench.teacher)
    theirs = [plain_network(cfg, network) for network in own]

    def take_steps(networks, batches, penalty, bf16=False):
        student = copy.deepcopy(networks[0])
        optimizer = torch.optim.Adam(student.parameters(), lr=cfg.lr)
        terms = []
        for batch in batches(bench.task, bench.pool, cfg.batch_size, cfg.seed, 1, 0):
            terms.append(r.train_step(student, networks[1], penalty, optimizer, batch, bf16))
        return torch.stack(terms).cpu()

    def compare(name, same_to, batches, penalties):
        plain = partial(take_steps, theirs, batches, penalties[0])
        ours = partial(take_steps, own, r.epoch_batches, penalties[1], cfg.bf16)
        bench.compare(name, plain, ours, (1.2, 3), None if cfg.bf16 else same_to)

    compare(f"{bench.steps} training steps ({NETWORK})", 1e-3, r.epoch_batches, (None, None))
    # to_tensor rounds pixels differently, and Adam's first steps amplify the differences.
    name = "the same, as the authors' code takes them"
    compare(name, 5e-2, plain_batches, both_penalties(bench, 4))


def bench_pool(bench: Bench) -> None:
    """The replay pool of the last task, from the same noise."""
    cfg = bench.cfg
    y = torch.arange(10 - 10 // cfg.tasks, device=bench.device)
    y = y.repeat_interleave(cfg.replay_per_class)
    shape = bench.task.x.shape[1:]
    noise = torch.randn(cfg.replay_per_class, *shape, device=bench.device)
    given = (noise, y, cfg.sample_steps, "replay pool")
    plain = partial(plain_images, cfg, plain_network(cfg, bench.teacher), *given)
    ours = partial(r.sample_images, cfg, bench.teacher, *given)
    name = f"sampling the replay pool ({NETWORK})"
    bench.compare(name, plain, ours, (1.3, 3), None if cfg.bf16 else 1e-3)


def bench_fisher(bench: Bench) -> None:
    """A task's rank-1 and diagonal Fisher."""

    def compute(fisher):
        generator = r.rng(bench.device, "fisher")
        return fisher(bench.student, *bench.pool, bench.cfg.fisher_samples, generator)

    rank1 = partial(compute, plain_rank1), partial(compute, r.rank1_fisher)
    diagonal = partial(compute, plain_diagonal), partial(compute, r.diagonal_fisher)
    bench.compare("mu and c* of a task", *rank1, (10, 30), 1e-4)
    bench.compare("diagonal of F", *diagonal, (4, 15), 1e-4)


def bench_penalty(bench: Bench) -> None:
    theta = bench.theta.clone().requires_grad_()

    def gradient(penalty):
        return torch.autograd.grad(penalty(theta), theta)[0]

    ways = [partial(gradient, penalty) for penalty in both_penalties(bench, 19)]
    bench.compare("penalty and its gradient after 19 tasks", *ways, (None, None), 1e-4)


def bench_reading(bench: Bench) -> None:
    """Read a task's images once, in batches on the device; the plain way by a DataLoader."""
    n = 600 if bench.small else 12_000
    size = bench.cfg.batch_size
    x = torch.randint(200, (n, 1, 32, 32), dtype=torch.uint8, device=bench.device)
    loader = DataLoader(Pictures(x, x[:, 0, 0, 0]), size)

    def plain():
        return torch.stack([images.to(bench.device).mean() for images, _ in loader])

    def ours():
        return torch.stack([r.to_float(images).mean() for images in x.split(size)])

    bench.compare(f"reading a task's {n:,} images once", plain, ours, (20, 20), 1e-4)


def bench_frechet_distance(bench: Bench) -> None:
    images, features = (200, 64) if bench.small else (2000, 2048)
    a, b = np.random.default_rng(0).normal(size=(2, images, features)) ** 2  # >= 0, as Inception's
    b += 0.1
    ways = partial(plain_distance, a, b), partial(r.frechet_distance, a, b)
    name = f"Frechet distance, {features} features, {images} images a side"
    bench.compare(name, *ways, (15, 10), 1e-3)


# ---- Whole runs, each in a process of its own.

OURS = [r.__file__]
PLAIN = ["-c", "from results import bench; bench.plain_run()"]


def in_a_process(program: list[str], flags: str) -> dict:
    """Run on a CPU. -> result.json with steps, memory and checkpoint. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *program, "--device", "cpu", *flags.split(), "--out", folder]
        process = subprocess.Popen(
            command,
            cwd=Path(r.__file__).parent,
            # Two BLAS threads would wait for each other while another program is busy.
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"try it by hand: {' '.join(command)}")
        result = json.loads(Path(folder, "result.json").read_text())
        log = pd.read_json(Path(folder, "log.jsonl"), lines=True)
        result["steps"] = int(log.groupby("task")["step"].max().sum())
        result["checkpoint MB"] = Path(folder, "checkpoint.pt").stat().st_size / 2**20
    result["memory MB"] = usage.ru_maxrss / 2**10
    return result


def bench_runs(bench: Bench) -> None:
    """Five tasks of digits, from the first step to the last FID."""
    runs = RUNS
    if bench.small:
        runs = {"a run of rank-1 EWC, 1 epoch": (f"{SIZES['small']} --epochs 1", None)}
    for name, (flags, aim) in runs.items():
        plain = in_a_process(PLAIN, flags)
        ours = in_a_process(OURS, flags)
        plain_s = sum(plain["seconds"].values())
        our_s = sum(ours["seconds"].values())
        apart = difference(plain["afid"][-1], ours["afid"][-1])
        bench.keep(name, plain_s, our_s, aim, apart, 0.1)
        parts = [f"{part} {plain['seconds'][part]}, {s}" for part, s in ours["seconds"].items()]
        bench.notes.append(f"- {name}, seconds of plain and ours: {'; '.join(parts)}")


# ---- What more tasks cost.


def share_of_a_step(bench: Bench, old_tasks: int) -> float:
    """The share of a training step that the rank-1 penalty and its gradient take."""
    model = bench.student
    optimizer = torch.optim.Adam(model.parameters(), lr=bench.cfg.lr)
    batch = next(r.epoch_batches(bench.task, bench.pool, bench.cfg.batch_size, 0, 1, 0))
    step = partial(r.train_step, model, bench.teacher, None, optimizer, batch)
    _, penalty = both_penalties(bench, old_tasks)

    def extra():
        penalty(r.flat(r.trainable(model))).backward()

    seconds = [(bench.timed(step)[0], bench.timed(extra)[0]) for _ in range(100)]
    without, more = np.median(seconds, axis=0).tolist()
    return more / (without + more)


def growth(bench: Bench, to: Path) -> None:
    """Print, plot and write what a run costs when its ten classes are split into more tasks."""
    epochs = 27
    counts = (2, 5, 10)
    rows = []
    for method in ("gd", "diag", "rank1"):
        for tasks in counts:
            flags = f"--method {method} --tasks {tasks} --epochs {epochs} --fisher-samples 1000"
            result = in_a_process(OURS, flags)
            row = {"method": method, "tasks": tasks}
            for name in ("steps", "checkpoint MB", "memory MB", "seconds"):
                row[name] = result[name]
            rows.append(row)
            print(row, flush=True)
    shares = {tasks: share_of_a_step(bench, tasks - 1) for tasks in counts}
    print(f"rank-1's share of a training step, by the number of tasks: {shares}")
    content = {"epochs": epochs, "runs": rows, "rank-1's share of a step": shares}
    r.write_json(to / "growth.json", bench.on | content)
    plot_growth(rows, to / "growth.png")


def plot_growth(rows: list[dict], path: Path) -> None:
    """Plot over the tasks each method's memory and checkpoint, and the seconds of rank1's parts."""
    table = pd.DataFrame(rows).pivot(index="tasks", columns="method")
    panels = {
        "memory MB (of the process)": table["memory MB"],
        "checkpoint MB (after the last task)": table["checkpoint MB"],
        "seconds of the whole run (rank1)": table["seconds"]["rank1"].apply(pd.Series),
    }
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, 3), panels.items()):
        curves.plot(ax=axes, style="o-", grid=True, xticks=curves.index, ylabel=title)
        axes.set_ylim(bottom=0)
    save(figure, path)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Print and write a line for each piece of work, and return the lines by name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--to", type=r.folder, help="where to write (default: results/pages/cost)")
    parser.add_argument("--growth", action="store_true", help="only what more tasks cost")
    given = parser.parse_args(argv)
    bench = Bench(given.small)
    to = given.to or (Path("runs/bench") if given.small else PAGES / "cost")
    pieces = [bench_training, bench_pool, bench_fisher, bench_penalty, bench_reading]
    pieces.append(bench_frechet_distance)
    if not bench.gpu:
        pieces.append(bench_runs)
    if given.growth:
        growth(bench, to)
        pieces = []
    for piece in pieces:
        piece(bench)
        bench.write(to)
    return bench.lines


if __name__ == "__main__":
    main()
