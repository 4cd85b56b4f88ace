"""What a trained model says about its Fisher F = E[g g^T]: the paper's Figures 1 to 3, and its VAE control.

    python -m results.geometry {1,2,3,vae} RUN [--to NAME] [--data-dir data] [--device auto]
    python -m results.geometry {1,2,3,vae,movement} --first-task FLAGS [--to NAME] ..
    python -m results.geometry relearning RUN RUN .. --against RUN RUN .. --to NAME ..

RUN is the folder of a finished run of rank1_ewc.py; or else the first task of a run with these FLAGS is
learned here, and looked at. `movement` goes on to the second task and watches its steps. Writes NAME.png and,
the numbers, NAME.json; of 3 and vae the main ones as tables too, NAME.md. `relearning` compares how fast the
final models of two rows of runs, a seed each, learn their first task again: NAME.csv, NAME.md and NAME.png.

Symbols: g_i the gradient of the i-th sample's loss, (D,); G all N of them, (N, D); mu = E[g]; F_t and mu_t
those of samples at timestep t; lambda_1 >= lambda_2 >= .. the eigenvalues of F; A what stands in for F.
"""

import argparse
import copy
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, islice, pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional as F

import rank1_ewc as r
from results import beyond
from results.report import markdown

TIMES = [*range(0, r.NUM_STEPS, 50), r.NUM_STEPS - 1]  # the timesteps that are looked at
VAE_STEPS = [0, 30, 100, 300, 1000, 3000]  # training steps after which a VAE's F is looked at
RELEARNING = [0, 5, 10, 20, 50, 100]  # training steps on task 1 after which its FID is taken
EVERY_STEP = (0, r.NUM_STEPS)
PUBLISHED_SHARE = {"VAE, KL x 1": 0.50, "VAE, KL x 0.001": 0.85, "DDPM": 0.99}  # lambda_1 / trace of F


def samples(data: r.Data, n: int, timesteps: tuple[int, int] = EVERY_STEP, draw="figure") -> Iterator[tuple]:
    """Draw n samples, in batches (x0, t, eps, y): the same images and noise whatever the timesteps."""
    for x0, t, eps, y in r.fisher_batches(data.x, data.y, n, r.rng(data.x.device, draw)):
        yield x0, beyond.squeezed(t, *timesteps), eps, y


def add_legend(axes: Axes, ncols: int = 5) -> None:
    """Draw grid lines, and the legend below the axes, where it covers no data."""
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=ncols, loc="upper center", bbox_to_anchor=(0.5, -0.16))


# ----------------------------------------------------------------------------------------------------------
# The figures. Each function gives its numbers and its picture; the images lie on the model's device.


@torch.no_grad()
def figure_1(model: nn.Module, data: r.Data, _: r.Settings) -> tuple[dict, Figure]:
    """Show MSE(x_t, sqrt(1 - abar_t) eps_hat) at each t, and where Proposition 1 has it.

    Tweedie: of the best denoiser, x_t - sqrt(1 - abar_t) eps_hat = sqrt(abar_t) E[x_0 | x_t, y]. At high
    noise that expectation is the class's mean image, at low noise x_0 itself: the MSE lies between
    abar_t E[E[x_0 | y]^2] and abar_t E[x_0^2], means over pixels, and vanishes with abar_t.
    """
    abar, n, mse = r.alphas_cumprod(data.x.device), beyond.GRADIENTS, []
    for time in TIMES:
        total = 0.0
        for x0, t, eps, y in samples(data, n, (time, time + 1)):
            x_t = r.add_noise(x0, t, eps)
            errors = x_t - (1 - abar[time]).sqrt() * model(x_t, t, y)  # (B, C, H, W)
            total += float(errors.square().flatten(1).mean(1).sum())
        mse.append(total / n)
    mean_image = any_image = 0.0  # E[E[x_0 | y]^2] and E[x_0^2]
    for y in data.y.unique():
        x0 = r.to_float(data.x[data.y == y])  # all images of a class
        mean_image += len(x0) / len(data.x) * x0.mean(0).square().mean()
        any_image += len(x0) / len(data.x) * x0.square().mean()
    high, low = (abar[TIMES] * mean_image).tolist(), (abar[TIMES] * any_image).tolist()

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(TIMES, mse, "o-", ms=4, label=r"measured: MSE($x_t$, $\sqrt{1-\bar\alpha_t}\,\hat\epsilon$)")
    axes.plot(TIMES, high, "--", label=r"Prop. 1, high noise: $\bar\alpha_t\,E[E[x_0|y]^2]$")
    axes.plot(TIMES, low, ":", label=r"low noise: $\bar\alpha_t\,E[x_0^2]$")
    axes.set(xlabel="timestep t", ylabel="MSE (pixels in -1..1)", yscale="log")
    add_legend(axes)
    return {"samples": n, "t": TIMES, "mse": mse, "high noise": high, "low noise": low}, figure


def geometry(
    model: nn.Module, data: r.Data, timesteps: tuple = EVERY_STEP, loss: Callable = r.per_sample_loss
) -> tuple[dict, Tensor, Tensor]:
    """Describe F by N gradients at these timesteps. -> numbers, mu (D,), |cos(g_i, mu)| of each sample (N,).

    loss(predict, *batch) -> (B,). mu_noise: what ||mu|| would be if the gradients had no mean. energy: c*
    ||mu||^2. error: ||F - A|| / ||F||, Frobenius, of each A on the gradients that A is made of, as in the
    paper; error_fresh: on as many others, of the same images with new noise. cos_top: like the mean of
    |cos(g_i, mu)|, for F's top eigenvector in mu's place.
    """
    n = beyond.gradients_kept(model)
    draws = [samples(data, n, timesteps, purpose) for purpose in ("figure", "fresh")]
    G, fresh = (torch.cat([*r.gradients(model, draw, loss)]) for draw in draws)
    # No D x D matrix is made: the Gram matrix G G^T / N has F's eigenvalues and its norm, and A is known by
    # ||A||^2 and by <F, A> = E[g^T A g], a function of the gradients.
    values, (top,) = beyond.eigenpairs(G, 1)
    mu, diagonal, lengths = G.mean(0), G.square().mean(0), G.norm(dim=1)  # (D,), (D,) and (N,)
    norm = math.sqrt(r.dot64(mu, mu))
    trace, first, F_squared = map(float, (values.sum(), values[0], values.square().sum()))
    mean_square = lambda v: float(v.square().mean())
    along = lambda g, v: mean_square(torch.linalg.vecdot(g, v))  # E[(v^T g)^2]; g @ v would round too much
    c_star = along(G, mu) / norm**4
    fitted = {
        "diagonal": (mean_square(diagonal) * len(mu), lambda g: float(g.square().mean(0) @ diagonal)),
        "mu mu^T": (norm**4, lambda g: along(g, mu)),
        "c* mu mu^T": (c_star**2 * norm**4, lambda g: c_star * along(g, mu)),
        "best of rank 1": ((first * r.dot64(top, top)) ** 2, lambda g: first * along(g, top)),
    }
    whole = {"F itself": (F_squared, lambda g: mean_square(g @ G.T))}  # of the first gradients
    numbers = {"c_star": c_star, "mu_norm": norm, "mu_noise": math.sqrt(trace / n)}
    numbers |= {"energy": c_star * norm**2, "trace": trace, "top_share": first / trace}
    numbers["eigenvalues"] = values[:5].tolist()
    numbers["error"] = errors(G, F_squared, fitted)
    numbers["error_fresh"] = errors(fresh, mean_square(fresh @ fresh.T), fitted | whole)
    numbers["cos_mu_top"] = abs(float(top @ mu)) / norm
    numbers["cos_top"] = float(((G @ top).abs() / lengths).mean())
    return numbers, mu, (G @ mu).abs() / (lengths * norm)


def errors(g: Tensor, F_squared: float, approximations: dict) -> dict[str, float]:
    """||F - A|| / ||F|| of each A, given as ||A||^2 and <F, A> of gradients g (N, D); F_squared: ||F||^2."""
    squared = {name: F_squared - 2 * product(g) + A for name, (A, product) in approximations.items()}
    return {name: math.sqrt(max(v, 0.0) / F_squared) for name, v in squared.items()}


def as_tables(described: dict[str, dict]) -> str:
    """Two tables of what geometry() says of several F, a row a name: their shape, and each A's errors."""
    shapes, misses = [], []
    for name, at in described.items():
        first, second, *_ = at["eigenvalues"]
        values = {"c\\*": at["c_star"], "norm of μ": at["mu_norm"], "of noise alone": at["mu_noise"]}
        values |= {"λ₁ / trace": at["top_share"], "λ₂ / λ₁": second / first}
        values |= {"\\|cos\\| of μ and top eigenvector": at["cos_mu_top"]}
        shapes.append({"F": name} | {column: f"{value:.2g}" for column, value in values.items()})
        same, fresh = at["error"], at["error_fresh"]
        misses.append({"F": name} | {A: f"{same.get(A, 0):.3f} / {e:.3f}" for A, e in fresh.items()})
    told = "Error ‖F − A‖ / ‖F‖ of each A, on the gradients that it was made of / on as many fresh ones:"
    return f"{markdown(shapes)}\n{told}\n\n{markdown(misses)}"


def geometry_at_each_time(model: nn.Module, data: r.Data) -> tuple[list[dict], Tensor, Tensor]:
    """Take geometry() at each of TIMES. -> its numbers, mu_t (times, D), |cos(g_i, mu_t)| (times, N)."""
    steps = r.progress(TIMES, "gradients", unit="timestep")
    numbers, mu, cos = zip(*[geometry(model, data, (t, t + 1)) for t in steps])
    return list(numbers), torch.stack(mu), torch.stack(cos)


def figure_2(model: nn.Module, data: r.Data, _: r.Settings) -> tuple[dict, Figure]:
    """Show |cos(g_i, mu_t)|, which Proposition 2 has at 1; its mean above, also for F_t's top eigenvector.

    Gradients of equal length, orthogonal to each other, have a cosine of N^-1/2 with their mean.
    """
    at_times, _, cos = geometry_at_each_time(model, data)
    cos, n = cos.cpu().double(), cos.shape[1]
    mean, mean_top = cos.mean(1).tolist(), [at["cos_top"] for at in at_times]

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, axes = figure.subplots(2, sharex=True, height_ratios=(1, 2.5))
    above.plot(TIMES, mean, "o-", ms=4, label=r"$\mu_t$")
    above.plot(TIMES, mean_top, "s--", ms=3, label=r"top eigenvector of $F_t$")
    above.axhline(n**-0.5, color="grey", ls=":", label="orthogonal gradients")
    above.set(ylim=(0, 1.05), ylabel=r"mean $|\cos(g_i, \cdot)|$")
    add_legend(above)
    mesh = axes.pcolormesh(TIMES, range(1, n + 1), cos.T.numpy(), vmin=0, vmax=1, rasterized=True)
    axes.set(xlabel="timestep t", ylabel="sample i")
    figure.colorbar(mesh, ax=axes, label=r"$|\cos(g_i, \mu_t)|$")
    numbers = {"samples": n, "t": TIMES, "mean": mean, "mean_top": mean_top}
    return numbers | {"cos": cos.round(decimals=4).tolist()}, figure


def figure_3(model: nn.Module, data: r.Data, _: r.Settings) -> tuple[dict, Figure]:
    """Show (a) cosines of mu_s and mu_t, (b, c) F_t's eigenvalues, (d) errors of approximations of F_t."""
    at_times, mu, cos = geometry_at_each_time(model, data)
    n, directions = cos.shape[1], F.normalize(mu)  # (times, D)
    all_timesteps = geometry(model, data)[0]
    cos_mu = (directions @ directions.T).tolist()
    values = [at["eigenvalues"] for at in at_times]  # (times, 5)
    ratio = [second / first for first, second, *_ in values]

    figure = Figure(figsize=(11, 9), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    mesh = a.pcolormesh(TIMES, TIMES, cos_mu, vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(mesh, ax=a, label=r"$\cos(\mu_s, \mu_t)$")
    a.set(title="(a) mean gradients", xlabel="timestep t", ylabel="timestep s", aspect="equal")
    b.plot(TIMES, values, "o-", ms=3, label=[rf"$\lambda_{j + 1}$" for j in range(len(values[0]))])
    b.set(title="(b) largest eigenvalues of $F_t$", ylabel="eigenvalue", yscale="log")
    c.plot(TIMES, ratio, "o-", ms=4, label="measured")
    c.plot(700, 0.022, "k*", ms=10, label="paper, t = 700: 0.022")
    c.set(title="(c) second eigenvalue over first", ylabel=r"$\lambda_2 / \lambda_1$", ylim=(0, 1.05))
    for i, name in enumerate(all_timesteps["error_fresh"]):
        same, fresh = ([at[key].get(name, math.nan) for at in at_times] for key in ("error", "error_fresh"))
        d.plot(TIMES, same, "o-", ms=4, color=f"C{i}", label=name)
        d.plot(TIMES, fresh, "--", color=f"C{i}")
    d.set(title="(d) approximations A of $F_t$; dashed: fresh gradients", ylabel=r"$\|F_t - A\| / \|F_t\|$")
    for axes in (b, c, d):
        axes.set(xlabel="timestep t")
        add_legend(axes, 5 if axes is b else 3)
    numbers = {"samples": n, "t": TIMES, "at": at_times, "all timesteps": all_timesteps}
    described = {f"t = {t}": at for t, at in zip(TIMES, at_times) if t in (100, 700)}
    table = as_tables(described | {"random t": all_timesteps})
    return numbers | {"cos_mu": cos_mu, "ratio": ratio, "table": table}, figure


class VAE(nn.Module):
    """A variational autoencoder (arXiv 1312.6114): x (B, pixels), eps (B, 8) -> image, mean, log variance."""

    def __init__(self, pixels: int, hidden: int = 128):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(pixels, hidden), nn.SiLU(), nn.Linear(hidden, 16))
        self.decode = nn.Sequential(nn.Linear(8, hidden), nn.SiLU(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        return self.decode(mean + (log_var / 2).exp() * eps), mean, log_var


def vae_loss(predict: Callable, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor, kl_weight: float) -> Tensor:
    """Squared error, mean over pixels, + kl_weight x KL divergence from N(0, 1), sum over latents. -> (B,).

    Takes the DDPM's samples: the latent vector's noise is the first 8 pixels of eps; t and y are not used.
    """
    x = x0.flatten(1)
    image, mean, log_var = predict(x, eps.flatten(1)[:, :8])
    kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
    return (image - x).square().mean(1) + kl_weight * kl


def train_vae(data: r.Data, kl_weight: float) -> list[dict]:
    """Train a VAE with Adam. -> after each of VAE_STEPS its geometry() and the squared error of a batch."""
    torch.manual_seed(0)  # the global generator gives the initial weights
    vae, history = VAE(data.x[0].numel()).to(data.x.device), []
    loss = partial(vae_loss, kl_weight=kl_weight)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    steps = VAE_STEPS[-1] + 1
    batches = r.fisher_batches(data.x, data.y, steps * r.FISHER_BATCH, r.rng(data.x.device, "vae"))
    for step, batch in enumerate(r.progress(batches, f"VAE, KL x {kl_weight:g}", total=steps)):
        if step in VAE_STEPS:
            mse = vae_loss(vae, *batch, kl_weight=0.0).mean().item()
            history.append(geometry(vae, data, loss=loss)[0] | {"mse": mse})
        optimizer.zero_grad()
        loss(vae, *batch).mean().backward()
        optimizer.step()
    return history


def figure_vae(model: nn.Module, data: r.Data, _: r.Settings) -> tuple[dict, Figure]:
    """Show the share of F's trace in its top eigenvalue: of VAEs while they learn, and of the DDPM."""
    n, numbers = beyond.gradients_kept(model), {"steps": VAE_STEPS}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for kl_weight in (1.0, 1e-3):
        name, history = f"VAE, KL x {kl_weight:g}", train_vae(data, kl_weight)
        axes.plot(VAE_STEPS, [at["top_share"] for at in history], "o-", ms=4, label=name)
        numbers[name] = history
    for when, timesteps in {"all t": EVERY_STEP, "t = 100": (100, 101), "t = 700": (700, 701)}.items():
        name, at = f"DDPM, {when}", geometry(model, data, timesteps)[0]
        axes.axhline(at["top_share"], ls="--", color=f"C{len(numbers) - 1}", label=f"{name}, trained")
        numbers[name] = [at]
    for color, (name, share) in zip(("C0", "C1", "k"), PUBLISHED_SHARE.items()):
        axes.plot(VAE_STEPS[-1], share, "*", ms=12, color=color, label=f"paper, {name}: about {share:.0%}")
    axes.set(xlabel="training steps of the VAE", ylabel=r"$\lambda_1$ / trace of $F$", ylim=(0, 1.05))
    axes.set_xscale("symlog", linthresh=VAE_STEPS[1])
    axes.set_xticks(VAE_STEPS, [str(step) for step in VAE_STEPS])
    axes.set_xlim(-3, 1.4 * VAE_STEPS[-1])
    add_legend(axes, ncols=3)
    table = as_tables({name: at[-1] for name, at in numbers.items() if name != "steps"})
    return {"samples": n, "table": table} | numbers, figure


def learn(cfg: r.Settings, state: r.State, task: r.Data, replay: tuple | None = None) -> None:
    """Learn a task, as a run with these settings does. `state` becomes that at its end."""
    with tempfile.TemporaryDirectory() as folder:  # for train_task's checkpoints
        cfg.out = Path(folder)
        r.train_task(cfg, state, task, replay, r.progress(total=r.steps_of(cfg, task)[1], unit="step"))


def learn_first_task(cfg: r.Settings, data: r.Data) -> tuple[r.State, list[r.Data]]:
    """Learn the first task of a run with these settings. -> the state at its end, and all tasks."""
    tasks, state = r.split_tasks(data, cfg.tasks), r.new_state(cfg, data, data.x.device)
    r.begin_task(cfg, state)
    learn(cfg, state, tasks[0])
    return state, tasks


class Watched(r.Rank1Penalty):
    """Rank-1 EWC of one old task, which watches each step along u = mu / ||mu||.

    After each step: "position" u^T (theta - theta*); "average", the same of the weights' running average with
    decay 0.99; "share" of the step's squared length that lies along u.
    """

    def add(self, fisher: tuple[Tensor, Tensor], weights: nn.Module) -> dict[str, float]:
        self.u, self.theta = F.normalize(fisher[0], dim=0), r.flat(r.trainable(weights)).detach()
        self.average, self.seen = self.theta, {"position": [], "average": [], "share": []}
        return super().add(fisher, weights)

    def after_step(self, model: nn.Module, lr: float) -> None:
        before, self.theta = self.theta, r.flat(r.trainable(model)).detach()
        self.average = torch.lerp(self.average, self.theta, 0.01)
        move = self.theta - before
        self.seen["position"].append(float(self.u @ (self.theta - self.origin)))
        self.seen["average"].append(float(self.u @ (self.average - self.origin)))
        self.seen["share"].append(float((self.u @ move).square() / move.square().sum()))


def figure_movement(_: None, data: r.Data, cfg: r.Settings) -> tuple[dict, Figure]:
    """Show how weights move along mu of the first task while the second is learned, with lambda 0 and lam."""
    first, tasks = learn_first_task(cfg, data)
    generator = r.rng(data.x.device, cfg.seed, "fisher", 0)
    fisher = r.rank1_fisher(first.model, tasks[0].x, tasks[0].y, cfg.fisher_samples, generator)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = {"samples": cfg.fisher_samples, "weights": len(fisher[0])}
    for i, lam in enumerate((0.0, cfg.lam)):
        state = copy.deepcopy(first)
        state.task, state.epoch, state.step, state.penalty = 1, 0, 0, Watched(lam)
        state.penalty.add(fisher, state.model)
        r.begin_task(cfg, state)
        replay = r.replay_pool(cfg, state.teacher, data.x.shape[1:], int(tasks[1].y.min()))
        learn(cfg, state, tasks[1], replay)
        position, average, share = map(torch.tensor, state.penalty.seen.values())
        half, name = len(share) // 2, rf"$\lambda$ = {lam:g}"
        numbers[f"lambda {lam:g}"] = {
            "mean share": float(share.mean()),
            "spread in the second half": float(position[half:].std()),
            "spread of the average": float(average[half:].std()),
        } | state.penalty.seen
        left.plot(position, color=f"C{i}", lw=0.8, label=f"weights, {name}")
        left.plot(average, "--", color=f"C{i}", label=f"their average (0.99), {name}")
        window = max(1, len(share) // 30)
        smooth = share.unfold(0, window, window).mean(1)
        right.plot(window * torch.arange(len(smooth)) + window // 2, smooth, "o-", ms=3, label=name)
    right.axhline(1 / numbers["weights"], color="grey", ls=":", label="a random direction")
    left.set(xlabel="step of the second task", ylabel=r"$u^T(\theta - \theta^*)$, $u = \mu / \|\mu\|$")
    right.set(xlabel="step of the second task", ylabel="share of a step along $u$", yscale="log")
    add_legend(left, ncols=2)
    add_legend(right, ncols=3)
    return numbers, figure


# ----------------------------------------------------------------------------------------------------------
# How fast is an old task relearned? (The question of arXiv 2602.02417, by three of the paper's authors.)


def relearn(cfg: r.Settings, model: nn.Module, data: r.Data, features: Callable) -> list[float]:
    """Train a final model on task 1's real images alone. -> FID of task 1 after each of RELEARNING steps.

    By the denoising loss, at a constant tenth of the run's learning rate; the FID is taken as in the run.
    """
    task, gradient_of = r.split_tasks(data, cfg.tasks)[0], r.gradient_function(cfg)
    (size, _), real, fid = r.steps_of(cfg, task), features(task.test_x), []
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr / 10)
    # The draws are those of a task after the last: of the seed alone, and new to the model.
    epochs = (r.epoch_batches(task, None, size, cfg.seed, cfg.tasks, epoch) for epoch in count())
    batches = chain.from_iterable(epochs)
    for before, steps in pairwise([0, *RELEARNING]):
        model.train()
        for batch in islice(batches, steps - before):
            r.train_step(model, None, None, optimizer, batch, gradient_of)
        (sampled,) = r.evaluate(cfg, model, [task], features, data.x.device)
        fid.append(r.frechet_distance(real, sampled))
    return fid


def compare_relearning(fid: dict[str, np.ndarray], seeds: list[int], learned: float) -> tuple[dict, Figure]:
    """Compare the FIDs (seeds, RELEARNING) of two rows, the second the baseline. -> CSV, Markdown; picture.

    learned: the mean FID of task 1 when it had just been learned. Intervals: 95%, by Student's t, over seeds.
    """
    half = lambda v: student_t.ppf(0.975, len(v) - 1) * v.std(0, ddof=1) / math.sqrt(len(v))
    (ours, base), (a, b) = fid, fid.values()
    mean, around = (a - b).mean(0), half(a - b)
    table, lines = [], ["seed,row,steps,FID"]
    for i, steps in enumerate(RELEARNING):
        interval = np.array([mean[i], mean[i] - around[i], mean[i] + around[i]])
        row = {"steps": steps, ours: float(a[:, i].mean()), base: float(b[:, i].mean())}
        row["difference"] = "{:+.2f} ({:.2f} to {:.2f})".format(*interval)
        row[f"of {base}'s mean"] = "{:+.1f}%, {:.1f} to {:.1f}".format(*100 * interval / row[base])
        table.append(row)
        lines += [f"{k},{name},{steps},{x}" for name, v in fid.items() for k, x in zip(seeds, v[:, i])]
    told = (
        f"Mean FID of task 1 over {len(seeds)} seeds, after so many steps on its images ({learned:.1f} when "
    )
    told += "just learned); differences seed by seed, with the 95% interval of their mean."

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, v in fid.items():
        left.plot(RELEARNING, v.mean(0), "o-", ms=4, label=name)
        left.fill_between(RELEARNING, v.mean(0) - half(v), v.mean(0) + half(v), alpha=0.2, lw=0)
    left.axhline(learned, color="grey", ls=":", label="just learned")
    right.errorbar(RELEARNING, mean, around, fmt="o-", ms=4, capsize=3, label=f"{ours} less {base}")
    right.axhline(0, color="black", lw=0.8)
    for axes, label in ((left, "FID of task 1"), (right, "difference, seed by seed")):
        axes.set(xlabel="training steps on task 1 alone", ylabel=f"{label} (mean, 95% interval)")
        axes.set_xticks(RELEARNING)
        add_legend(axes)
    return {"csv": "\n".join([*lines, ""]), "md": f"{markdown(table)}\n{told}\n"}, figure


def relearning(runs: list[Path], against: list[Path], data_dir: Path, device: str) -> tuple[dict, Figure]:
    """Relearn task 1 with two rows of runs, and compare_relearning(). Stops if the rows cannot be paired."""
    rows = [[load_run(run, data_dir, device) for run in row] for row in (runs, against)]
    rows = [sorted(row, key=lambda run: run[0].seed) for row in rows]
    settings = [[r.settings_of(cfg) for cfg, *_ in row] for row in rows]
    seeds = [[each.pop("seed") for each in row] for row in settings]
    ours, base = (row[0] for row in settings)
    alike = all(each == row[0] for row in settings for each in row)
    if not alike or ours == base or ours | {key: base[key] for key in ("method", "lam")} != base:
        r.stop(
            "within a row the runs must differ in --seed alone, between the rows in --method and --lam too"
        )
    if seeds[0] != seeds[1] or not 1 < len(seeds[0]) == len({*seeds[0]}):
        r.stop(f"both rows must have the same seeds, two at least, a run each: not {seeds[0]} and {seeds[1]}")
    (cfg, _, data), fid = rows[0][0], {}
    features = r.fid_features(cfg, data.to(torch.device("cpu")), data.x.device)
    for of, row in zip((ours, base), rows):
        name = f"{of['method']} --lam {of['lam']:g}" if of["lam"] else of["method"]
        fid[name] = np.array([relearn(*run, features) for run in r.progress(row, name, unit="run")])
    learned = [r.read_result(run / "result.json")["fid"][0][0] for run in against]
    return compare_relearning(fid, seeds[0], float(np.mean(learned)))


# ----------------------------------------------------------------------------------------------------------
# Command line.

FIGURES = {"1": figure_1, "2": figure_2, "3": figure_3, "vae": figure_vae, "movement": figure_movement}


def load_data(cfg: r.Settings) -> r.Data:
    """Settle the device, and read the data of a run with these settings on to it."""
    device = r.set_up(cfg)
    data = r.load_data(cfg.dataset, cfg.data_dir)
    data = r.limit_classes(data, cfg.limit) if cfg.limit else data
    return r.Data(*[v.to(device) for v in data])


def load_run(run: Path, data_dir: Path, device: str) -> tuple[r.Settings, nn.Module, r.Data]:
    """Read a finished run. -> its settings; model, in eval mode, and data, on the device. Or stop."""
    paper = {name: row[0] for name, row in r.SETTINGS.items()}  # for what an older result.json lacks
    result = r.read_result(run / "result.json")
    cfg = r.Settings(**paper | result["config"] | {"data_dir": data_dir, "device": device})
    data = load_data(cfg)
    state = r.new_state(cfg, data, data.x.device)
    if state.data != result.get("data", state.data):
        r.stop(f"{run} is of other images or labels than those in {data_dir}: name another --data-dir")
    broken = f"{run / 'model.pt'} is missing, damaged or of another network"
    with r.or_stop(broken, f"train it anew with --out {run} --fresh, or name another run"):
        state.model.load_state_dict(r.load_whole(run / "model.pt", torch.device("cpu")))
    return cfg, state.model.eval(), data


def save(name: str | Path, figure: Figure, **texts: str) -> None:
    """Write NAME.png, and each text with its ending."""
    with r.whole(Path(f"{name}.png")) as file:
        figure.savefig(file, dpi=120)
    for ending, text in texts.items():
        with r.whole(Path(f"{name}.{ending}")) as file:
            file.write(text.encode())
    print(f"In {', '.join(f'{name}.{ending}' for ending in ('png', *texts))}")


def main(argv: list[str] | None = None) -> None:
    """Make a figure of a finished run, or compare how fast runs relearn: a picture and its numbers."""
    summary = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser("python -m results.geometry", description=summary)
    parser.error = r.stop
    parser.add_argument("figure", choices=[*FIGURES, "relearning"], help="the paper's number of it, or ..")
    parser.add_argument("runs", metavar="RUN", type=r.folder, nargs="*", help="folder of a finished run; or:")
    parser.add_argument("--first-task", metavar="FLAGS", help='"--lr 1e-3 --seed 7": of which run')
    parser.add_argument(
        "--against", metavar="RUN", type=r.folder, nargs="+", help="the other row, of relearning"
    )
    parser.add_argument(
        "--to", metavar="NAME", type=r.folder, help="of the files (default: runs/figure1-<dataset>, ..)"
    )
    parser.add_argument("--data-dir", type=r.folder, default=Path("data"), help="where the datasets are")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, .. or mps")
    args = parser.parse_args(argv)
    if args.figure == "relearning":
        if not (args.runs and args.against and args.to) or args.first_task:
            r.stop("relearning takes runs, others to compare them with, --against RUN .., and --to NAME")
        texts, figure = relearning(args.runs, args.against, args.data_dir, args.device)
        return save(args.to, figure, **texts)
    first = args.first_task is not None
    if len(args.runs) != (not first) or (args.figure == "movement" and not first) or args.against:
        r.stop("name a finished run, or else --first-task FLAGS (movement: always)")
    if args.runs:
        cfg, model, data = load_run(*args.runs, args.data_dir, args.device)
    else:
        where = ["--data-dir", str(args.data_dir), "--device", args.device]
        cfg = r.parse_args([*shlex.split(args.first_task), *where])
        model, data = None, load_data(cfg)
        if args.figure != "movement":
            state, (data, *_) = learn_first_task(cfg, data)
            model = state.model.eval()
    numbers, figure = FIGURES[args.figure](model, data, cfg)
    run = f"{cfg.dataset}, {cfg.method}, seed {cfg.seed}, {cfg.epochs} epochs a task at lr {cfg.lr:g}"
    run += " falling to 0" if cfg.lr_decay == "linear" else ""
    if args.figure == "movement":
        run += f": second task, mu of the first from {numbers['samples']:,} samples"
    else:
        run += f"{', first task' if args.first_task else ''}: {len(r.flat(model.parameters())):,} weights"
        run += f", {numbers['samples']:,} samples a timestep"
    figure.suptitle(run, fontsize="medium")
    name = args.to or f"runs/figure{args.figure}-{cfg.dataset}"
    texts = {"md": numbers.pop("table")} if "table" in numbers else {}
    r.write_json(Path(f"{name}.json"), {"figure": args.figure, "config": r.settings_of(cfg)} | numbers)
    save(name, figure, **texts)


if __name__ == "__main__":
    main()
