"""How much faster is this project's code than the plain way to write it, and do both compute the same?

    python -m results.bench            # a quarter of an hour on a CPU; writes results/bench-<device>.json, .md
    python -m results.bench --quick    # small sizes, once each, in seconds; writes only what --to FILE names
    python -m results.bench --growth   # what runs of 2, 5 and 10 tasks cost; writes results/growth.json, .png

The plain way is what a reader of the paper would write first: a loop over samples, over tasks, over classes,
around diffusers' network and sampler where diffusers is installed. Each piece of work is done in both ways,
turn about, and what counts is the ratio of the median times. On a CPU the network is the digits'. On a GPU
it is the paper's, and ours trains and samples in bfloat16, its steps recorded, as in a run.
"""

import argparse
import copy
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import cleanfid.fid
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
    "quick": "--fisher-samples 20 --batch-size 8 --replay-per-class 5 --sample-steps 4",
    "cpu": "--fisher-samples 200",
    "cuda": "--dataset mnist --fisher-samples 128 --replay-per-class 100 --sample-steps 10",
}
VARIANTS = {"plain": "", "bf16": "--bf16", "accumulate 2": "--accumulate 2"}
TRICKS = ["float32", "bf16", "bf16 fused", "bf16 fused repeatable", "bf16 fused repeatable recorded"]


class Bench:
    """What the pieces of work share: two untrained networks, a task of random images, and the lines."""

    def __init__(self, quick: bool):
        self.quick, self.gpu, self.lines = quick, torch.cuda.is_available(), {}
        sizes = SIZES["quick" if quick else "cuda" if self.gpu else "cpu"]
        self.cfg = r.parse_args(["--method", "gd", *sizes.split()])
        self.device = r.set_up(self.cfg)
        self.steps, side = 3 if quick else 10 if self.gpu else 20, 8 if self.cfg.dataset == "digits" else 32
        shape = self.steps * self.cfg.batch_size, 1, side, side
        generator = r.rng(self.device, "images")
        x = torch.randint(256, shape, generator=generator, device=self.device).to(torch.uint8)
        y = torch.arange(len(x), device=self.device) % 10
        self.task = r.Data(x, y, x, y)
        self.student = r.new_state(self.cfg, self.task, self.device).model
        self.cfg.seed = 1
        self.teacher = r.new_state(self.cfg, self.task, self.device).model.eval().requires_grad_(False)

    def timed(self, way: Callable) -> tuple:
        """The seconds that way() takes, with what it left to the GPU, and its result."""
        started = time.perf_counter()
        result = way()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started, result

    def compare(self, name: str, plain: Callable, ours: Callable, aims: tuple, same_to: float | None) -> dict:
        """Do a piece of work both ways, turn about; print and keep the median seconds and the difference.

        aims: how many times as fast ours should be, on a CPU and on a GPU. same_to: the largest difference of
        the results that is allowed; None where ours is in bfloat16; plain then has PyTorch's defaults.
        """
        seconds = []
        for _ in range(2 if self.quick else 4 if self.gpu else 6):
            torch.backends.cudnn.allow_tf32 = same_to is None
            torch.use_deterministic_algorithms(self.gpu and same_to is not None, warn_only=True)
            plain_s, plain_result = self.timed(plain)
            torch.backends.cudnn.allow_tf32 = False
            torch.use_deterministic_algorithms(self.gpu, warn_only=True)
            ours_s, our_result = self.timed(ours)
            seconds.append((plain_s, ours_s))
        plain_s, ours_s = np.median(seconds[1:], axis=0).tolist()  # the first turn warms up
        ratio, aim, apart = plain_s / ours_s, aims[self.gpu], difference(plain_result, our_result)
        times = f"{plain_s:9.3g}{ours_s:9.3g}{ratio:7.1f}{aim or '-':>5}{apart:12.1e}"
        missed = "  missed" if aim and ratio < aim and not self.quick else ""
        differs = "  NOT THE SAME" if same_to and apart > same_to else ""
        print(f"{name:55}{times}{missed}{differs}", flush=True)
        line = {"plain s": plain_s, "ours s": ours_s, "ours first s": seconds[0][1], "ratio": ratio}
        self.lines[name] = line | {"aim": aim, "difference": apart, "same to": same_to}
        return self.lines[name]


def difference(plain: float | Tensor | tuple, ours: float | Tensor | tuple) -> float:
    """The largest difference as a share of the largest value, of images the mean; of a tuple the worst."""
    if isinstance(plain, tuple):
        return max(difference(a, b) for a, b in zip(plain, ours))
    plain, ours = torch.as_tensor(plain), torch.as_tensor(ours)
    gap = (plain.double() - ours.double()).abs()
    gap = gap.mean() if plain.dtype == torch.uint8 else gap.max()
    return float(gap / plain.abs().max())


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


def bench_fisher(bench: Bench) -> None:
    """The Fisher of a task: plain is the gradient of one sample at a time, summed in float64."""
    model = copy.deepcopy(bench.student).eval()
    x, y, n = bench.task.x, bench.task.y, bench.cfg.fisher_samples

    def one_by_one(generator):
        for batch in r.fisher_batches(x, y, n, generator):
            for i in range(len(batch[0])):
                loss = r.per_sample_loss(model, *[v[i : i + 1] for v in batch]).mean()
                yield r.flat(torch.autograd.grad(loss, model.parameters())).double()

    def plain_rank1():
        generator = r.rng(bench.device, "fisher")
        mu = sum(one_by_one(generator)) / n
        energy = sum((mu @ g) ** 2 for g in one_by_one(generator)) / n  # over fresh draws
        return mu, energy / (mu @ mu) ** 2

    def plain_diagonal():
        return sum(g**2 for g in one_by_one(r.rng(bench.device, "fisher"))) / n

    def ours(fisher):
        return fisher(model, x, y, n, r.rng(bench.device, "fisher"))

    bench.compare("mu and c* of a task", plain_rank1, lambda: ours(r.rank1_fisher), (10, 30), 1e-4)
    bench.compare("diagonal of F", plain_diagonal, lambda: ours(r.diagonal_fisher), (4, 15), 1e-4)


def bench_training(bench: Bench) -> None:
    """Steps with replay and distillation, on the same batches; leaves the seconds of one of ours to the bench."""
    cfg, half, replay = bench.cfg, bench.cfg.batch_size, (bench.task.x.flip(0), bench.task.y.flip(0))
    start = copy.deepcopy(bench.student.state_dict())
    student, teacher = plain_network(cfg, bench.student), plain_network(cfg, bench.teacher)

    def begin(student):  # from the same weights, in the second task
        student.load_state_dict(start)
        fused = (bench.gpu and student is bench.student) or None  # as in a run
        optimizer = torch.optim.Adam(student.parameters(), lr=cfg.lr, fused=fused)
        return optimizer, r.epoch_batches(bench.task, replay, half, cfg.seed, 1, 0)

    def plain():
        optimizer, batches = begin(student)
        step_losses = []
        for x0, t, eps, y in batches:
            x_t = r.add_noise(x0, t, eps)
            eps_student = student(x_t, t, y)
            with torch.no_grad():
                eps_teacher = teacher(x_t[half:], t[half:], y[half:])
            denoise = F.mse_loss(eps_student[:half], eps[:half])
            distill = F.mse_loss(eps_student[half:], eps_teacher)
            optimizer.zero_grad()
            (denoise + distill).backward()
            optimizer.step()
            step_losses.append([denoise.item(), distill.item(), 0.0])
        return torch.tensor(step_losses)

    gradient_of = r.gradient_function(cfg)

    def ours():
        optimizer, batches = begin(bench.student)
        networks = bench.student, bench.teacher, None, optimizer
        return torch.stack([r.train_step(*networks, batch, gradient_of) for batch in batches]).cpu()

    name, same_to = f"{bench.steps} training steps ({NETWORK})", None if cfg.bf16 else 1e-3
    bench.step_seconds = bench.compare(name, plain, ours, (1.2, 3), same_to)["ours s"] / bench.steps


def bench_penalty(bench: Bench) -> None:
    """The penalty after 19 tasks and its gradient: plain keeps every mu and theta* in float64."""
    theta, penalty, tasks = r.flat(bench.student.parameters()).detach(), r.Rank1Penalty(1.0), []
    generator, c_star = r.rng(bench.device, "penalty"), theta.new_tensor(1e-6)
    for _ in range(19):
        mu, step = torch.randn(2, len(theta), generator=generator, device=bench.device)
        tasks.append((mu.double(), (theta + 0.01 * step).double()))
        penalty.add((mu, c_star), theta + 0.01 * step)

    def plain_penalty(weights):
        return sum(c_star * (mu @ (weights.double() - theta_star)) ** 2 for mu, theta_star in tasks) / 2

    def gradient(of):
        weights = theta.clone().requires_grad_()
        return torch.autograd.grad(of(weights), weights)[0]

    name = "penalty and its gradient after 19 tasks"
    line = bench.compare(name, lambda: gradient(plain_penalty), lambda: gradient(penalty), (None, None), 1e-4)
    line["plain MB"] = sum(mu.nbytes + theta_star.nbytes for mu, theta_star in tasks) / 2**20
    line["ours MB"] = sum(v.nbytes for v in vars(penalty).values() if torch.is_tensor(v)) / 2**20
    line["share of a step"], share = line["ours s"] / bench.step_seconds, line["ours MB"] / line["plain MB"]
    print(f"    keeps {share:.2f} of the memory (aim: a third)" + ("  missed" if share > 1 / 3 else ""))


def bench_pool(bench: Bench) -> None:
    """The replay pool of the last task, from the same noise: plain is a class at a time."""
    cfg, shape, num_old = bench.cfg, bench.task.x.shape[1:], 10 - 10 // bench.cfg.tasks
    teacher = plain_network(cfg, bench.teacher)

    @torch.no_grad()
    def plain():
        generator, images = r.rng(bench.device, cfg.seed, "replay pool"), []
        noise = torch.randn(cfg.replay_per_class, *shape, generator=generator, device=bench.device)
        for c in range(num_old):
            for x in noise.split(200):
                y = torch.full((len(x),), c, device=bench.device)
                if diffusers:
                    scheduler = diffusers.DDIMScheduler()
                    scheduler.set_timesteps(cfg.sample_steps)
                    for t in scheduler.timesteps:
                        x = scheduler.step(teacher(x, t, y), t, x).prev_sample
                else:
                    x = r.ddim_sample(teacher, x, y, cfg.sample_steps)
                images.append(r.to_uint8(x))
        return torch.cat(images)

    def ours():
        return r.replay_pool(cfg, bench.teacher, shape, num_old)[0]

    name, same_to = f"sampling the replay pool ({NETWORK})", None if cfg.bf16 else 1e-3
    bench.compare(name, plain, ours, (1.3, 3), same_to)


def bench_frechet_distance(bench: Bench) -> None:
    """The Frechet distance: plain is clean-fid's, by a matrix square root, without its warnings."""
    images, features = (200, 64) if bench.quick else (2000, 2048)
    a, b = np.random.default_rng(0).normal(size=(2, images, features)) ** 2  # never negative, as Inception's
    b += 0.1

    def plain():
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            return cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))

    name = f"Frechet distance, {features} features, {images} images a side"
    bench.compare(name, plain, lambda: r.frechet_distance(a, b), (15, 10), 1e-3)


def bench_reading(bench: Bench) -> None:
    """A task's images once, in batches on the device: plain is a DataLoader over PIL images."""
    shape, size, device = (600 if bench.quick else 12_000, 1, 32, 32), bench.cfg.batch_size, bench.device
    images = torch.randint(200, shape).to(torch.uint8)
    on_device, pictures = images.to(device), [Image.fromarray(image[0].numpy()) for image in images]
    loader = DataLoader(pictures, size, collate_fn=lambda batch: torch.stack([to_tensor(v) for v in batch]))

    def plain():
        return torch.stack([(2 * x.to(device) - 1).mean() for x in loader])

    def ours():
        return torch.stack([r.to_float(x).mean() for x in on_device.split(size)])

    bench.compare(f"reading a task's {len(images):,} images once", plain, ours, (20, 20), 1e-4)


def step_against_matrix_products(bench: Bench) -> dict[str, float]:
    """What share of the speed of large matrix products a training step of bench_training reaches."""
    x0 = torch.zeros(2 * bench.cfg.batch_size, *bench.task.x.shape[1:], device=bench.device)
    zeros = torch.zeros(len(x0), dtype=torch.long, device=bench.device)
    with FlopCounterMode(display=False) as counter:
        sum(r.losses(bench.student, bench.teacher, x0, zeros, x0, zeros)).backward()
    side, flop = 8192 if bench.gpu else 2048, counter.get_total_flops()
    square = torch.randn(side, side, device=bench.device)
    square = square.bfloat16() if bench.cfg.bf16 else square
    peak = 2 * side**3 / min(bench.timed(lambda: square @ square)[0] for _ in range(20))
    share = flop / bench.step_seconds / peak
    print(f"a training step reaches {share:.0%} of the speed of a large matrix product here")
    return {"seconds": bench.step_seconds, "GFLOP": flop / 1e9, "peak GFLOP/s": peak / 1e9, "share": share}


def short_runs(device: torch.device) -> dict[str, list[float]]:
    """The final AFID of short runs on digits: no variant should move it further than another seed does."""
    print("\nAFID of short runs on digits, seeds 0, 1, 2")
    found = {}
    for variant, flags in VARIANTS.items():
        found[variant] = []
        for seed in range(3):
            argv = f"--epochs 27 --replay-per-class 50 --seed {seed} --no-bf16 {flags}".split()
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                result = r.main([*argv, "--device", device.type, "--out", folder])
            found[variant].append(result["afid"][-1])
        within = min(found["plain"]) <= np.mean(found[variant]) <= max(found["plain"])
        afids = "".join(f"{afid:9.1f}" for afid in found[variant])
        print(f"{variant:14}{afids}" + ("" if within else "  mean outside the plain seeds'"), flush=True)
    return found


def run_of_tasks(tasks: int, method: str, epochs: int) -> dict:
    """Run digits in so many tasks, in a process of its own. -> its seconds by part and what it took up."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--method {method} --tasks {tasks} --epochs {epochs} --fisher-samples 1000 --device cpu"
        command = [sys.executable, r.__file__, *flags.split(), "--out", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            r.stop(f"{' '.join(command)} failed: try it by hand")
        result = json.loads(Path(folder, "result.json").read_text())
        steps = [json.loads(line)["step"] for line in Path(folder, "log.jsonl").read_text().splitlines()]
        row = {"method": method, "tasks": tasks, "steps": sum(steps[epochs - 1 :: epochs])}
        row["checkpoint MB"] = Path(folder, "checkpoint.pt").stat().st_size / 2**20
    return row | {"memory MB": usage.ru_maxrss / 2**10, "seconds": result["seconds"]}


def second_task_of_digits() -> tuple:
    """Digits' network on a CPU at the start of GD's second task, and a batch: all that train_step takes."""
    cfg = r.parse_args(["--device", "cpu", "--method", "gd"])
    data, device = r.load_data("digits", cfg.data_dir), r.set_up(cfg)
    state, task = r.new_state(cfg, data, device), r.split_tasks(data, cfg.tasks)[1]
    state.task = 1
    r.begin_task(cfg, state)
    batch = next(r.epoch_batches(task, (task.x, task.y), cfg.batch_size, cfg.seed, 1, 0))
    return state.model, state.teacher, None, state.optimizer, batch, r.gradient_function(cfg)


def milliseconds_by_threads() -> dict[str, float]:
    """A training step in one thread and in two, on idle cores and beside a process that keeps one busy."""
    training_step, medians = second_task_of_digits(), {}
    for beside, program in {"idle cores": "", "one busy": "while True: pass"}.items():
        other = subprocess.Popen([sys.executable, "-c", program])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seconds = []
            for _ in range(53):
                started = time.perf_counter()
                r.train_step(*training_step)
                seconds.append(time.perf_counter() - started)
            medians[f"{beside}, threads {threads}"] = 1000 * float(np.median(seconds[3:]))
        other.kill()
        other.wait()
    return medians


def milliseconds_with(bench: Bench, tricks: str) -> float:
    """A training step of GD on a GPU, with what makes it faster, and with what makes it repeatable."""
    cfg, replay = copy.deepcopy(bench.cfg), (bench.task.x, bench.task.y)
    cfg.bf16, cfg.cuda_graph = "bf16" in tricks, "recorded" in tricks
    student, teacher = (copy.deepcopy(network) for network in (bench.student, bench.teacher))
    optimizer = torch.optim.Adam(student.parameters(), lr=cfg.lr, fused="fused" in tricks or None)
    batch = next(r.epoch_batches(bench.task, replay, cfg.batch_size, cfg.seed, 1, 0))
    torch.use_deterministic_algorithms("repeatable" in tricks, warn_only=True)
    step = partial(r.train_step, student, teacher, None, optimizer, batch, r.gradient_function(cfg))
    return 1000 * float(np.median([bench.timed(step)[0] for _ in range(13)][3:]))


def penalty_share_of_a_step(tasks: int) -> float:
    """What share of a training step of the digits' network rank-1's penalty takes in the last of many tasks."""
    model, *rest = second_task_of_digits()
    theta, penalty = r.flat(model.parameters()).detach(), r.Rank1Penalty(1.0)
    for k in range(tasks - 1):
        mu = torch.randn(theta.shape, generator=r.rng(theta.device, "mu", k))
        penalty.add((mu, theta.new_tensor(1e-6)), theta)
    seconds = []
    for _ in range(100):  # a step without the penalty, then the penalty and its gradient
        times = [time.perf_counter()]
        r.train_step(model, *rest)
        times.append(time.perf_counter())
        penalty(model).backward()
        seconds.append(np.diff([*times, time.perf_counter()]))
    step, extra = np.median(seconds, axis=0)
    return float(extra / (step + extra))


def plot_growth(rows: list[dict], path: Path) -> None:
    """Draw memory and checkpoint of each method, and the seconds of rank1's parts, over the number of tasks."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels, methods = figure.subplots(1, 3), dict.fromkeys(row["method"] for row in rows)
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        tasks = [row["tasks"] for row in own]
        for axes, name in zip(panels, ("memory MB", "checkpoint MB")):
            axes.plot(tasks, [row[name] for row in own], "o-", label=method)
            axes.set_ylabel(
                f"{name} (of the process)" if "memory" in name else f"{name} (after the last task)"
            )
    own = [row for row in rows if row["method"] == "rank1"]
    for part in ("train", "replay", "fisher", "fid"):
        panels[2].plot([row["tasks"] for row in own], [row["seconds"][part] for row in own], "o-", label=part)
    panels[2].set_ylabel("seconds of the whole run (rank1)")
    for axes in panels:
        axes.set(xlabel="tasks that the ten classes come in", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # below: it covers no data
    with r.whole(path) as file:
        figure.savefig(file, dpi=120)


def growth(to: Path, counts: tuple = (2, 5, 10), epochs: int = 27) -> dict:
    """What a run costs as its ten classes come in more tasks: print, draw and write it."""
    rows = [run_of_tasks(tasks, method, epochs) for method in ("gd", "diag", "rank1") for tasks in counts]
    shares = {tasks: penalty_share_of_a_step(tasks) for tasks in counts}
    for row in rows:
        print(json.dumps(row))
    for tasks, share in shares.items():
        print(f"rank-1's share of a training step in the last of {tasks} tasks: {share:.1%}")
    plot_growth(rows, to.with_suffix(".png"))
    content = {"epochs": epochs, "runs": rows, "rank-1's share of a step": shares, "script": r.SCRIPT}
    r.write_json(to.with_suffix(".json"), content)
    return content


def as_table(content: dict, lines: dict[str, dict]) -> str:
    """The lines of a bench as a table, and what else it measured, for the notebook."""
    rows = []
    for name, line in lines.items():
        missed = line["aim"] and line["ratio"] < line["aim"]
        seconds = {column: f"{line[column]:.3g}" for column in ("plain s", "ours s")}
        ratio = {"ratio": f"{line['ratio']:.1f}" + (" (missed)" if missed else "")}
        ratio["aim"] = line["aim"] and f"{line['aim']:g}"
        rows.append({"piece of work": name} | seconds | ratio | {"difference": f"{line['difference']:.0e}"})
    names = [content[name] for name in ("device", "torch", "dataset", "script")]
    notes = [f"On a {names[0]}, PyTorch {names[1]}, the network of {names[2]}; script {names[3]}."]
    if "training step" in content:
        share = content["training step"]["share"]
        notes.append(f"- a training step reaches {share:.0%} of the speed of a large matrix product")
    for name in ("ms of a training step", "AFID of short runs"):
        for key, value in content.get(name, {}).items():
            values = value if isinstance(value, list) else [value]
            notes.append(f"- {name}, {key}: {', '.join(f'{v:.0f}' for v in values)}")
    return "\n".join([markdown(rows), *notes, ""])


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Print a line for each piece of work, write them, and return them by name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, once each, no short runs")
    parser.add_argument("--to", type=Path, help="file to write (default: results/bench-<device>.json)")
    parser.add_argument("--growth", action="store_true", help="what more tasks cost, and nothing else")
    given = parser.parse_args(argv)
    if given.growth:
        return growth(given.to or Path(__file__).with_name("growth"))
    r.QUIET, bench = True, Bench(given.quick)
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name() if bench.gpu else cpu
    content = {"device": name, "torch": torch.__version__, "dataset": bench.cfg.dataset, "script": r.SCRIPT}
    print(f"{', '.join(content.values())}\n\n{'':57}plain s   ours s  ratio  aim  difference")
    if not given.quick:
        given.to = given.to or Path(__file__).with_name(f"bench-{re.sub('[^A-Za-z0-9]+', '-', name)}.json")

    def keep():  # after each part: one that is stopped has lost nothing that it measured
        if given.to:
            r.write_json(given.to, content | bench.lines)
            with r.whole(given.to.with_suffix(".md")) as file:
                file.write(as_table(content, bench.lines).encode())

    parts = bench_training, bench_penalty, bench_reading, bench_pool, bench_fisher, bench_frechet_distance
    for part in parts:
        part(bench)
        keep()
    if not given.quick:
        content["training step"] = step_against_matrix_products(bench)
        ms = content["ms of a training step"] = {} if bench.gpu else milliseconds_by_threads()
        for tricks in TRICKS if bench.gpu else []:
            ms[tricks] = milliseconds_with(bench, tricks)
            keep()
        print("ms of a training step:", ", ".join(f"{name}: {v:.0f}" for name, v in ms.items()), flush=True)
        content["AFID of short runs"] = short_runs(bench.device)
        keep()
    return bench.lines


if __name__ == "__main__":
    main()
