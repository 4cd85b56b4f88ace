"""The Fisher F = E[g g^T] of a trained model: the paper's Figures 1 to 3, and a VAE.

    python -m results.geometry {1,2,3,vae} RUN --to NAME [--data-dir data]
    python -m results.geometry {1,2,3,vae,movement} --first-task FLAGS --to NAME ..
    python -m results.geometry relearning RUN RUN .. --against RUN RUN .. --to NAME ..

RUN is the folder of a finished run of rank1_ewc.py. With --first-task, a new model learns the first
task of a run with these FLAGS. `vae` is the paper's control. `movement` also learns the second task
and records its steps. The picture is NAME.png, its numbers are in NAME.json, and the main numbers
of 3 and vae are also in tables, NAME.md. `relearning` compares how fast the final models of two
rows of runs, one run per seed, relearn their first task: NAME.csv, NAME.md and NAME.png.

Symbols: g_i the gradient of the i-th sample's loss, (D,); G all N of them, (N, D); mu = E[g]; F_t
and mu_t those of samples at timestep t; lambda_1 >= lambda_2 >= .. the eigenvalues of F; A an
approximation of F.
"""

import argparse
import copy
import math
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy.signal import lfilter
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.linalg import vecdot
from torch.nn.functional import normalize

import rank1_ewc as r
from results import beyond
from results.report import interval, markdown, save, write_text

TIMES = [*range(0, r.NUM_STEPS, 50), r.NUM_STEPS - 1]  # the timesteps at which F_t is computed
VAE_STEPS = [0, 30, 100, 300, 1000, 3000]  # training steps after which a VAE's F is computed
RELEARNING = [0, 5, 10, 20, 50, 100]  # training steps on task 1 after which its FID is computed
EVERY_STEP = (0, r.NUM_STEPS)

# ---- A figure is a function figure(model, data, cfg) -> its numbers, a dict, and its picture.
# The model is in eval mode, and the images are on its device.


def samples(data: r.Data, n: int, timesteps=EVERY_STEP, draw="figure") -> Iterator[tuple]:
    """n samples in batches (x0, t, eps, y); images and noise do not depend on the timesteps."""
    generator = r.rng(data.x.device, draw)
    for x0, t, eps, y in r.fisher_batches(data.x, data.y, n, generator):
        yield x0, beyond.squeezed(t, *timesteps), eps, y


def add_legend(axes) -> None:
    """Grid lines, and the legend below the axes, where it covers no data."""
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


@torch.no_grad()
def figure_1(model, data: r.Data, _) -> tuple:
    """MSE(x_t, sqrt(1 - abar_t) eps_hat) at each t, and what Proposition 1 predicts.

    By Tweedie's formula the best denoiser has x_t - sqrt(1 - abar_t) eps_hat =
    sqrt(abar_t) E[x_0 | x_t, y]. At high noise this expectation is the class's mean image, at low
    noise x_0 itself. So the MSE lies between abar_t E[E[x_0 | y]^2] and abar_t E[x_0^2] (means over
    pixels), and vanishes with abar_t.
    """
    abar = r.alphas_cumprod(data.x.device)
    n = beyond.GRADIENTS
    mse = []
    for time in TIMES:
        squares = []
        for x0, t, eps, y in samples(data, n, (time, time + 1)):
            x_t = r.add_noise(x0, t, eps)
            error = x_t - (1 - abar[time]).sqrt() * model(x_t, t, y)  # (B, C, H, W)
            squares.append(error.square())
        mse.append(torch.cat(squares).mean().item())

    mean_image = 0.0  # E[E[x_0 | y]^2]
    any_image = 0.0  # E[x_0^2]
    for y in data.y.unique():
        x0 = r.to_float(data.x[data.y == y])  # all images of a class
        share = len(x0) / len(data.x)
        mean_image += share * x0.mean(0).square().mean()
        any_image += share * x0.square().mean()
    high = (abar[TIMES] * mean_image).tolist()
    low = (abar[TIMES] * any_image).tolist()

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(TIMES, mse, ".-", label=r"measured: $x_t$, $\sqrt{1-\bar\alpha_t}\,\hat\epsilon$")
    axes.plot(TIMES, high, "--", label=r"Prop. 1, high noise: $\bar\alpha_t\,E[E[x_0|y]^2]$")
    axes.plot(TIMES, low, ":", label=r"low noise: $\bar\alpha_t\,E[x_0^2]$")
    axes.set(xlabel="timestep t", ylabel="mean squared error (pixels in -1..1)", yscale="log")
    add_legend(axes)
    return {"samples": n, "t": TIMES, "mse": mse, "high noise": high, "low noise": low}, figure


# ---- F from per-sample gradients. No D x D matrix is made: each matrix except the diagonal is
# H^T H / M for an H of M rows. For F these are the g_i, for A = a v v^T the single sqrt(a) v.


def gradients(model: nn.Module, batches: Iterator[tuple], loss: Callable) -> Tensor:
    """G (N, D), the per-sample gradients."""
    return torch.cat([r.per_sample_gradients(model, batch, loss) for batch in batches])


def inner(G: Tensor, H: Tensor) -> float:
    """<F, A>, the sum of all F_ij A_ij, for F = G^T G / N and A = H^T H / M. G (N, D), H (M, D)."""
    return (G @ H.T).double().square().mean().item()


def errors(G: Tensor, diagonal: Tensor, others: dict[str, Tensor]) -> dict[str, float]:
    """The error ||F - A|| / ||F|| of each approximation A of F = G^T G / N, G (N, D).

    diagonal (D,): that of the diagonal A. others: for each other A = H^T H / M its H (M, D).
    """
    F_squared = inner(G, G)
    products = {"diagonal": (r.dot(G.square().mean(0), diagonal), r.dot(diagonal, diagonal))}
    for name, H in others.items():
        products[name] = (inner(G, H), inner(H, H))
    found = {}
    for name, (product, A_squared) in products.items():
        squared = F_squared - 2 * product + A_squared
        found[name] = math.sqrt(max(squared, 0.0) / F_squared)
    return found


def geometry(
    model: nn.Module, data: r.Data, timesteps=EVERY_STEP, loss: Callable = r.per_sample_loss
) -> tuple[dict, Tensor, Tensor]:
    """Describe F by N gradients at these timesteps. -> numbers, mu (D,), |cos(g_i, mu)| (N,).

    loss(predict, *batch) -> (B,). mu_noise: the ||mu|| to expect of gradients whose true mean is 0.
    energy: c* ||mu||^2. error: ||F - A|| / ||F|| (Frobenius) of each A on the gradients that A is
    made of, as in the paper; error_fresh: on as many fresh samples. cos_top: the mean of
    |cos(g_i, v)| for F's top eigenvector v.
    """
    n = beyond.gradients_kept(model)
    G = gradients(model, samples(data, n, timesteps), loss)
    fresh = gradients(model, samples(data, n, timesteps, "fresh"), loss)
    lengths = G.norm(dim=1)
    mu = G.mean(0)
    norm = math.sqrt(r.dot(mu, mu))
    along_mu = vecdot(G, mu)  # mu^T g_i (N,); G @ mu would round too much
    c_star = along_mu.square().mean().item() / norm**4
    values, (top,) = beyond.eigenpairs(G, 1)
    values = values.numpy()
    largest = values[0]
    trace = values.sum()

    diagonal = G.square().mean(0)
    others = {
        "mu mu^T": mu[None],
        "c* mu mu^T": c_star**0.5 * mu[None],
        "best of rank 1": largest**0.5 * top[None],
        "F itself": G,
    }
    numbers = {
        "c_star": c_star,
        "mu_norm": norm,
        "mu_noise": math.sqrt(trace / n),
        "energy": c_star * norm**2,
        "trace": trace,
        "top_share": largest / trace,
        "eigenvalues": values[:5].tolist(),
        "error": errors(G, diagonal, others),
        "error_fresh": errors(fresh, diagonal, others),
        "cos_mu_top": abs(r.dot(top, mu)) / norm,
        "cos_top": (vecdot(G, top).abs() / lengths).mean().item(),
    }
    return numbers, mu, along_mu.abs() / (lengths * norm)


def geometry_at_each_time(model: nn.Module, data: r.Data) -> tuple[pd.DataFrame, Tensor, Tensor]:
    """geometry() at TIMES: a table of its numbers, mu_t (times, D), |cos(g_i, mu_t)| (times, N)."""
    steps = r.progress(TIMES, "gradients", unit="timestep")
    numbers, mu, cos = zip(*[geometry(model, data, (t, t + 1)) for t in steps])
    return pd.DataFrame(numbers, TIMES), torch.stack(mu), torch.stack(cos)


def error_tables(at: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """geometry()'s errors of several F as two tables, one line per F: "error", "error_fresh"."""
    return pd.DataFrame([*at["error"]], at.index), pd.DataFrame([*at["error_fresh"]], at.index)


def as_tables(at: pd.DataFrame) -> str:
    """geometry()'s numbers of several F as two tables: the shape of each F, and each A's errors."""
    eigenvalues = at["eigenvalues"].str
    shape = pd.DataFrame(
        {
            "c\\*": at["c_star"],
            "norm of μ": at["mu_norm"],
            "of noise alone": at["mu_noise"],
            "λ₁ / trace": at["top_share"],
            "λ₂ / λ₁": eigenvalues[1] / eigenvalues[0],
            "\\|cos\\| of μ and top eigenvector": at["cos_mu_top"],
        }
    )
    shape = shape.map("{:.2g}".format).reset_index(names="F")
    error, fresh = error_tables(at)
    pairs = error.map("{:.3f} / ".format) + fresh.map("{:.3f}".format)
    told = "Error ‖F − A‖ / ‖F‖ of each A, on the gradients that it was made of / on as many fresh "
    told += "ones:"
    return f"{markdown(shape)}\n{told}\n\n{markdown(pairs.reset_index(names='F'))}"


def figure_2(model, data: r.Data, _) -> tuple:
    """|cos(g_i, mu_t)|, 1 by Proposition 2. Above: its mean, and that of F_t's top eigenvector.

    N orthogonal gradients of equal length have a cosine of N^-1/2 with their mean.
    """
    at, _, cos = geometry_at_each_time(model, data)
    cos = cos.cpu().double()
    n = cos.shape[1]
    mean = cos.mean(1).tolist()
    mean_top = at["cos_top"].tolist()

    figure, (above, axes) = plt.subplots(
        2, sharex=True, height_ratios=(1, 2.5), figsize=(8, 6), layout="constrained"
    )
    above.plot(TIMES, mean, ".-", label=r"of gradients and their mean $\mu_t$")
    above.plot(TIMES, mean_top, ".--", label="and the top eigenvector of $F_t$")
    above.axhline(n**-0.5, color="grey", ls=":", label="orthogonal ones and their mean")
    above.set(ylim=(0, 1.05), ylabel="mean |cosine|")
    add_legend(above)
    mesh = axes.pcolormesh(TIMES, range(1, n + 1), cos.T, vmin=0, vmax=1)
    axes.set(xlabel="timestep t", ylabel="number of the sample")
    figure.colorbar(mesh, ax=axes, label=r"|cosine| of its gradient and $\mu_t$")
    cos = cos.round(decimals=4).tolist()
    return {"samples": n, "t": TIMES, "mean": mean, "mean_top": mean_top, "cos": cos}, figure


def figure_3(model, data: r.Data, _) -> tuple:
    """(a) cosines of mu_s and mu_t; (b, c) F_t's eigenvalues; (d) the errors of each A."""
    at, mu, cos = geometry_at_each_time(model, data)
    all_timesteps, _, _ = geometry(model, data)
    directions = normalize(mu)  # (times, D)
    cos_mu = (directions @ directions.T).tolist()
    values = np.stack(at["eigenvalues"])  # (times, 5)
    ratio = values[:, 1] / values[:, 0]
    error, fresh = error_tables(at)

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    mesh = a.pcolormesh(TIMES, TIMES, cos_mu, vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(mesh, ax=a, label=r"cosine of $\mu_s$ and $\mu_t$")
    a.set(title="(a) mean gradients", xlabel="timestep t", ylabel="timestep s", aspect="equal")
    b.plot(TIMES, values, ".-", label=[rf"$\lambda_{j}$" for j in range(1, 6)])
    b.set(title="(b) largest eigenvalues of $F_t$", ylabel="eigenvalue", yscale="log")
    c.plot(TIMES, ratio, ".-", label="measured")
    c.plot(700, 0.022, "k*", label="paper, t = 700: 0.022")
    c.set(title="(c) second eigenvalue over first", ylabel="their ratio", ylim=(0, 1.05))
    d.plot(TIMES, error, ".-", label=[*error])
    d.set_prop_cycle(None)  # so that dashed lines get the solid ones' colours
    d.plot(TIMES, fresh, "--")
    d.set(title="(d) approximations A of $F_t$; dashed: fresh gradients")
    d.set(ylabel="distance of A from $F_t$, over $F_t$'s norm")
    for axes in (b, c, d):
        axes.set(xlabel="timestep t")
        add_legend(axes)

    random_t = pd.DataFrame([all_timesteps], ["random t"])
    rows = at[at.index.isin([100, 700])].rename("t = {}".format)
    numbers = {
        "samples": cos.shape[1],
        "t": TIMES,
        "at": at.to_dict("records"),
        "all timesteps": all_timesteps,
        "cos_mu": cos_mu,
        "ratio": ratio.tolist(),
        "table": as_tables(pd.concat([rows, random_t])),
    }
    return numbers, figure


# ---- The control: is F of rank 1 because the model is a diffusion model?


class VAE(nn.Module):
    """A variational autoencoder (arXiv 1312.6114).

    x (B, pixels), eps (B, 8) -> image, mean, log variance.
    """

    def __init__(self, pixels: int):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(pixels, 128), nn.SiLU(), nn.Linear(128, 16))
        self.decode = nn.Sequential(nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, pixels))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean + (log_var / 2).exp() * eps
        return self.decode(z), mean, log_var


def vae_loss(predict: Callable, x0: Tensor, t, eps: Tensor, y, kl_weight: float) -> Tensor:
    """Squared error (pixels' mean) + kl_weight x KL divergence from N(0, 1) (summed). -> (B,).

    Takes the DDPM's samples: the noise of the 8 latent variables is the first 8 pixels of eps; t
    and y are not used.
    """
    x = x0.flatten(1)
    image, mean, log_var = predict(x, eps.flatten(1)[:, :8])
    kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
    return (image - x).square().mean(1) + kl_weight * kl


def train_vae(data: r.Data, kl_weight: float) -> list[dict]:
    """Train a VAE. -> its geometry() and a batch's squared error after each of VAE_STEPS."""
    torch.manual_seed(0)  # the global generator gives the initial weights
    device = data.x.device
    vae = VAE(data.x[0].numel()).to(device)
    loss = partial(vae_loss, kl_weight=kl_weight)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    steps = VAE_STEPS[-1] + 1
    batches = r.fisher_batches(data.x, data.y, steps * r.FISHER_BATCH, r.rng(device, "vae"))
    history = []
    for step, batch in enumerate(r.progress(batches, f"VAE, KL x {kl_weight:g}", total=steps)):
        if step in VAE_STEPS:
            numbers, _, _ = geometry(vae, data, loss=loss)
            mse = vae_loss(vae, *batch, kl_weight=0.0).mean().item()
            history.append(numbers | {"mse": mse})
        optimizer.zero_grad()
        loss(vae, *batch).mean().backward()
        optimizer.step()
    return history


def figure_vae(model, data: r.Data, _) -> tuple:
    """The share of F's trace in its top eigenvalue, for VAEs as they learn and for the DDPM."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps = [str(step) for step in VAE_STEPS]  # as text: at equal distances on the axis
    found = {}
    for color, kl_weight, published in (("C0", 1.0, 0.50), ("C1", 1e-3, 0.85)):
        name = f"VAE, KL x {kl_weight:g}"
        found[name] = train_vae(data, kl_weight)
        shares = [at["top_share"] for at in found[name]]
        axes.plot(steps, shares, ".-", color=color, label=name)
        label = f"paper, {name}: about {published:.0%}"
        axes.plot(steps[-1], published, "*", color=color, label=label)
    axes.plot(steps[-1], 0.99, "k*", label="paper, DDPM: about 99%")
    times = {"all t": EVERY_STEP, "t = 100": (100, 101), "t = 700": (700, 701)}
    for color, (when, timesteps) in zip(("C2", "C3", "C4"), times.items()):
        at, _, _ = geometry(model, data, timesteps)
        name = f"DDPM, {when}"
        found[name] = [at]
        axes.axhline(at["top_share"], ls="--", color=color, label=f"{name}, trained")
    axes.set(xlabel="training steps of the VAE", ylabel="share of $F$'s trace in one eigenvalue")
    axes.set(ylim=(0, 1.05))
    add_legend(axes)
    last = pd.DataFrame([history[-1] for history in found.values()], [*found])
    n = beyond.gradients_kept(model)
    return {"samples": n, "table": as_tables(last), "steps": VAE_STEPS} | found, figure


# ---- How weights move along mu.


def learn(cfg, state: r.State, task: r.Data, replay: tuple | None = None) -> None:
    """Learn a task as a run with these settings does, and update `state`."""
    state.saved_at = math.inf  # so that no checkpoint is written
    _, steps = r.steps_of(cfg, task)
    with r.progress(None, cfg.method, total=steps, unit="step") as bar:
        r.train_task(cfg, state, task, replay, bar)


class Watched(r.Rank1Penalty):
    """Rank-1 EWC of one old task that records each step along u = mu / ||mu||.

    "position": u^T (theta - theta*) after the step. "share": how much of the step's squared length
    lies along u.
    """

    def add(self, fisher: tuple[Tensor, Tensor], theta: Tensor) -> None:
        super().add(fisher, theta)
        self.u = normalize(fisher[0], dim=0)
        self.theta = theta
        self.seen = []

    def after_step(self, model: nn.Module, lr: float) -> None:
        theta = r.flat(r.trainable(model)).detach()
        move = theta - self.theta
        position = r.dot(self.u, theta - self.origin)
        share = r.dot(self.u, move) ** 2 / r.dot(move, move)
        self.seen.append({"position": position, "share": share})
        self.theta = theta


def figure_movement(model, data: r.Data, cfg) -> tuple:
    """How the weights move along mu of the first task while the second is learned.

    With lambda 0, and with cfg.lam. model: after the first task; data: of all tasks. The average is
    the weights' exponential moving average with decay 0.99.
    """
    first, second, *_ = r.split_tasks(data, cfg.tasks)
    theta = r.flat(r.trainable(model)).detach()
    generator = r.rng(data.x.device, cfg.seed, "fisher", 0)
    fisher = r.rank1_fisher(model, first.x, first.y, cfg.fisher_samples, generator)
    replay = r.replay_pool(cfg, model, data.x.shape[1:], int(second.y.min()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    numbers = {"samples": cfg.fisher_samples, "weights": len(theta)}
    for color, lam in (("C0", 0.0), ("C1", cfg.lam)):
        state = r.new_state(cfg, data, data.x.device)
        state.model = copy.deepcopy(model)
        state.task = 1
        state.penalty = Watched(lam)
        state.penalty.add(fisher, theta)
        r.begin_task(cfg, state)
        learn(cfg, state, second, replay)

        seen = pd.DataFrame(state.penalty.seen)
        seen["average"] = lfilter([0.01], [1, -0.99], seen["position"])  # the average's position
        spread = seen[len(seen) // 2 :].std()
        numbers[f"lambda {lam:g}"] = {
            "mean share": seen["share"].mean(),
            "spread in the second half": spread["position"],
            "spread of the average": spread["average"],
        } | seen.to_dict("list")
        name = rf"$\lambda$ = {lam:g}"
        left.plot(seen["position"], color=color, label=f"weights, {name}")
        left.plot(seen["average"], "--", color=color, label=f"their average (0.99), {name}")
        window = math.ceil(len(seen) / 30)
        right.plot(seen["share"].rolling(window, center=True).mean(), label=name)
    right.axhline(1 / len(theta), color="grey", ls=":", label="a random direction")
    left.set(ylabel=r"distance from $\theta^*$ along $\mu$")
    right.set(ylabel=r"share of a step along $\mu$", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="step of the second task")
        add_legend(axes)
    return numbers, figure


# ---- How fast is an old task relearned? (The question of arXiv 2602.02417, by three of the paper's
# authors.)


def relearn(cfg, model: nn.Module, data: r.Data, features: Callable) -> list[dict]:
    """Train a final model on task 1's real images alone. -> FID of task 1 after RELEARNING steps.

    With the denoising loss, at a constant tenth of the run's learning rate. The FID is computed as
    in the run.
    """
    row = f"{cfg.method} --lam {cfg.lam:g}" if cfg.lam else cfg.method
    task = r.split_tasks(data, cfg.tasks)[0]
    real = features(task.test_x)
    size, _ = r.steps_of(cfg, task)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr / 10)
    lines = []
    step = 0
    # The draws of a task after the last depend on the seed alone, and are new to the model.
    for epoch in count():
        for batch in r.epoch_batches(task, None, size, cfg.seed, cfg.tasks, epoch):
            if step in RELEARNING:
                (sampled,) = r.evaluate(cfg, model, [task], features, data.x.device)
                fid = r.frechet_distance(real, sampled)
                lines.append({"seed": cfg.seed, "row": row, "steps": step, "FID": fid})
                model.train()
            if step == RELEARNING[-1]:
                return lines
            r.train_step(model, None, None, optimizer, batch, cfg.bf16)
            step += 1


def compare_relearning(lines: pd.DataFrame, learned: float, to: Path) -> None:
    """Compare two rows in relearn()'s lines, the second the baseline: TO.csv, TO.md, TO.png.

    learned: the baseline's mean FID of task 1 just after it was learned. Intervals: 95%, paired
    Student's t over the seeds.
    """
    ours, base = lines["row"].unique()
    means = lines.pivot_table("FID", "steps", "row", sort=False)
    by_seed = lines.pivot(index="seed", columns=["row", "steps"], values="FID")
    mean = means[ours] - means[base]
    low, high = ttest_rel(by_seed[ours], by_seed[base]).confidence_interval()
    gaps = np.transpose([mean, low, high])
    percent = 100 * gaps / means[[base]].to_numpy()
    table = means.map("{:.1f}".format).reset_index()
    table["difference"] = [interval(*gap, 2) for gap in gaps]
    table[f"of {base}'s mean"] = ["{:+.1f}%, {:.1f} to {:.1f}".format(*gap) for gap in percent]
    told = (
        "FID of task 1 after so many steps on its images; just learned, it had "
        f"{learned:.1f}. Mean of {len(by_seed)} seeds; difference seed by seed, with the 95% "
        "interval of its mean."
    )
    csv = lines.sort_values("steps", kind="stable").to_csv(index=False)
    write_text(Path(f"{to}.csv"), csv)
    write_text(Path(f"{to}.md"), f"{markdown(table)}\n{told}\n")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot(RELEARNING, means, ".-", label=[ours, base])
    left.axhline(learned, color="grey", ls=":", label="just learned")
    left.set(ylabel="FID of task 1, mean over the seeds")
    label = f"{ours} less {base}, seed by seed"
    right.errorbar(RELEARNING, mean, high - mean, fmt=".-", label=label)
    right.axhline(0, color="grey")
    right.set(ylabel="difference (mean, 95% interval)")
    for axes in (left, right):
        axes.set(xlabel="training steps on task 1 alone", xticks=RELEARNING)
        add_legend(axes)
    save(figure, Path(f"{to}.png"))


def relearning(runs: list[Path], against: list[Path], to: Path, data_dir: Path) -> None:
    """Relearn task 1 with the models of two rows, and compare. Stops if runs cannot be paired."""
    ours = [load_run(run, data_dir) for run in runs]
    base = [load_run(run, data_dir) for run in against]
    may_differ = {"method": None, "lam": None}
    our_settings = [r.settings_of(cfg) | may_differ for cfg, _, _ in ours]
    base_settings = [r.settings_of(cfg) | may_differ for cfg, _, _ in base]
    if our_settings != base_settings or len(runs) < 2:
        seeds = "the same seeds in the same order, at least two"
        r.stop(f"both rows must have {seeds}, and differ in --method and --lam alone")
    cfg, _, data = base[0]
    # As in a run, the classifier learns all images, with their labels from before --class-order.
    features = r.fid_features(cfg, r.load_data(cfg.dataset, data_dir), data.x.device)
    lines = []
    for loaded in r.progress([*ours, *base], "relearning", unit="run"):
        lines += relearn(*loaded, features)
    learned = [r.read_result(run / "result.json")["fid"][0][0] for run in against]
    compare_relearning(pd.DataFrame(lines), np.mean(learned), to)


# ---- The model of a finished run, or of the first task of a new one.


def begin(cfg) -> tuple[r.State, r.Data]:
    """The state and the data, on the device, with which a run with these settings begins."""
    device = r.set_up(cfg)
    data = r.load_data(cfg.dataset, cfg.data_dir)
    if cfg.limit:
        data = r.limit_classes(data, cfg.limit)
    state = r.new_state(cfg, data, device)
    data, _ = r.order_classes(cfg, data)
    return state, data.to(device)


def load_run(run: Path, data_dir: Path) -> tuple:
    """A finished run's settings, model (in eval mode) and data. Stops if these are other data."""
    result = r.read_result(run / "result.json")
    cfg = argparse.Namespace(**result["config"] | {"data_dir": data_dir, "device": "auto"})
    state, data = begin(cfg)
    if state.data != result["data"]:
        r.stop(f"{run} has learned other images or labels than those in --data-dir {data_dir}")
    weights = r.load_tensors(run / "model.pt", data.x.device, "train it anew, with --fresh")
    state.model.load_state_dict(weights)
    return cfg, state.model.eval(), data


def learn_first_task(cfg) -> tuple[nn.Module, r.Data]:
    """The model (in eval mode) after the first task of a run with these settings; all its data."""
    state, data = begin(cfg)
    r.begin_task(cfg, state)
    learn(cfg, state, r.split_tasks(data, cfg.tasks)[0])
    return state.model.eval(), data


# ---- Command line.

FIGURES = {
    "1": figure_1,
    "2": figure_2,
    "3": figure_3,
    "vae": figure_vae,
    "movement": figure_movement,
}


def main(argv: list[str] | None = None) -> None:
    """Make a figure of a model, or compare how fast runs relearn their first task."""
    summary = __doc__.partition("\n\n")[0]
    parser = argparse.ArgumentParser("python -m results.geometry", description=summary)
    parser.error = r.stop
    add = parser.add_argument
    add("figure", choices=[*FIGURES, "relearning"], help="its number in the paper, or a name")
    add("runs", metavar="RUN", type=r.folder, nargs="*", help="folder of a finished run")
    add("--first-task", metavar="FLAGS", help="instead of RUN: learn the first task with these")
    add("--against", metavar="RUN", type=r.folder, nargs="+", default=[], help="the baseline row")
    add("--to", metavar="NAME", type=r.folder, required=True, help="name of the files")
    add("--data-dir", type=r.folder, default=Path("data"), help="where the datasets are")
    args = parser.parse_args(argv)
    if args.figure == "relearning":
        relearning(args.runs, args.against, args.to, args.data_dir)
        return
    if args.first_task is not None:
        cfg = r.parse_args(shlex.split(args.first_task))
        cfg.data_dir = args.data_dir
        model, data = learn_first_task(cfg)
        if args.figure != "movement":
            data = r.split_tasks(data, cfg.tasks)[0]
    elif len(args.runs) == 1 and args.figure != "movement":
        cfg, model, data = load_run(args.runs[0], args.data_dir)
    else:
        r.stop("name one finished run or --first-task FLAGS; movement needs the latter")
    numbers, figure = FIGURES[args.figure](model, data, cfg)
    of = f"{cfg.dataset}, {cfg.method}, seed {cfg.seed}, {cfg.epochs} epochs a task at lr {cfg.lr}"
    if cfg.lr_decay == "linear":
        of += " falling to 0"
    if not args.runs:
        of += ", first task"
    figure.suptitle(f"{of}: {numbers['samples']:,} samples", fontsize="medium")
    save(figure, Path(f"{args.to}.png"))
    if "table" in numbers:
        write_text(Path(f"{args.to}.md"), numbers.pop("table"))
    about = {"figure": args.figure, "config": r.settings_of(cfg)}
    r.write_json(Path(f"{args.to}.json"), about | numbers)


if __name__ == "__main__":
    beyond.add_rows()  # so that its methods and datasets are known
    main()
