"""What a trained model says about its Fisher F = E[g g^T]: the paper's Figures 1 to 3, and its VAE control.

    python -m results.geometry {1,2,3,vae} RUN [--to NAME] [--data-dir data] [--device auto]
    python -m results.geometry {1,2,3,vae,movement} --first-task FLAGS [--to NAME] ..

RUN is the folder of a finished run of rank1_ewc.py; or else the first task of a run with these FLAGS is learned
here, and looked at. `movement` goes on to the second task, and watches its steps. Writes NAME.png and, the
numbers, NAME.json; of 3 and vae the main ones as a table too, NAME.md.

Symbols: g_i the gradient of the i-th sample's loss, (D,); G all N of them, (N, D); mu = E[g]; F_t and mu_t
those of samples at timestep t; lambda_1 >= lambda_2 >= .. the eigenvalues of F.
"""

import argparse
import copy
import math
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import rank1_ewc as r
from results import beyond
from results.report import markdown

TIMES = [*range(0, r.NUM_STEPS, 50), r.NUM_STEPS - 1]  # the timesteps that are looked at
VAE_STEPS = [0, 30, 100, 300, 1000, 3000]  # training steps after which a VAE's F is looked at
EVERY_STEP = (0, r.NUM_STEPS)
PUBLISHED_SHARE = {"VAE, KL x 1": 0.50, "VAE, KL x 0.001": 0.85, "DDPM": 0.99}  # lambda_1 / trace of F


def samples(data: r.Data, n: int, timesteps: tuple[int, int] = EVERY_STEP) -> Iterator[tuple]:
    """Draw n samples, in batches (x0, t, eps, y): the same images and noise whatever the timesteps."""
    for x0, t, eps, y in r.fisher_batches(data.x, data.y, n, r.rng(data.x.device, "figure")):
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
    model: nn.Module, batches: Iterable[tuple], loss: Callable = r.per_sample_loss
) -> tuple[dict, Tensor, Tensor]:
    """Describe F by the gradients of N samples. -> numbers, mu (D,), |cos(g_i, mu)| of each sample (N,).

    loss(predict, *batch) -> (B,). No D x D matrix is made: the Gram matrix G G^T / N has F's eigenvalues.
    mu_noise: what ||mu|| would be if the gradients had no mean. energy: c* ||mu||^2. error: relative, in the
    Frobenius norm. cos_top: like the mean of |cos(g_i, mu)|, for F's top eigenvector in mu's place.
    """
    G = torch.cat(list(r.gradients(model, batches, loss)))
    values, (top,) = beyond.eigenpairs(G, 1)
    mu, diagonal, lengths = G.mean(0), G.square().mean(0), G.norm(dim=1)  # (D,), (D,) and (N,)
    norm, trace, F_squared = float(mu.norm()), float(values.sum()), float(values.square().sum())
    mu_F_mu = float((G @ mu).square().mean())  # E[(mu^T g)^2]
    c_star = mu_F_mu / norm**4
    squared_error = {  # ||F - c mu mu^T||^2 = ||F||^2 - 2 c mu^T F mu + c^2 ||mu||^4
        "diagonal": F_squared - float(diagonal.square().sum()),
        "mu mu^T": F_squared - 2 * mu_F_mu + norm**4,
        "c* mu mu^T": F_squared - c_star * mu_F_mu,
        "best of rank 1": float(values[1:].square().sum()),
    }
    numbers = {
        "c_star": c_star,
        "mu_norm": norm,
        "mu_noise": math.sqrt(trace / len(G)),
        "energy": c_star * norm**2,
        "trace": trace,
        "eigenvalues": values[:5].tolist(),
        "top_share": float(values[0]) / trace,
        "cos_mu_top": abs(float(top @ mu)) / norm,
        "error": {name: math.sqrt(max(v, 0.0) / F_squared) for name, v in squared_error.items()},
        "cos_top": float(((G @ top).abs() / lengths).mean()),
    }
    return numbers, mu, (G @ mu).abs() / (lengths * norm)


def as_table(described: dict[str, dict]) -> str:
    """A table of what geometry() says of several F, a row a name."""
    rows = []
    for name, at in described.items():
        first, second, *_ = at["eigenvalues"]
        values = {"c\\*": at["c_star"], "norm of μ": at["mu_norm"], "of noise alone": at["mu_noise"]}
        values |= {"λ₁ / trace": at["top_share"], "λ₂ / λ₁": second / first}
        values |= {"\\|cos\\| of μ and top eigenvector": at["cos_mu_top"]}
        values |= {f"error of {approximation}": error for approximation, error in at["error"].items()}
        rows.append({"F": name} | {column: f"{value:.2g}" for column, value in values.items()})
    return markdown(rows)


def geometry_at_each_time(model: nn.Module, data: r.Data) -> tuple[list[dict], Tensor, Tensor]:
    """Take geometry() at each of TIMES. -> its numbers, mu_t (times, D), |cos(g_i, mu_t)| (times, N)."""
    n, steps = beyond.gradients_kept(model), r.progress(TIMES, "gradients", unit="timestep")
    numbers, mu, cos = zip(*[geometry(model, samples(data, n, (t, t + 1))) for t in steps])
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
    all_timesteps = geometry(model, samples(data, n))[0]
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
    for name in all_timesteps["error"]:
        d.plot(TIMES, [at["error"][name] for at in at_times], "o-", ms=4, label=name)
    d.set(title="(d) approximations A of $F_t$", ylabel=r"$\|F_t - A\| / \|F_t\|$", ylim=(0, 1.05))
    for axes in (b, c, d):
        axes.set(xlabel="timestep t")
        add_legend(axes)
    numbers = {"samples": n, "t": TIMES, "at": at_times, "all timesteps": all_timesteps}
    described = {f"t = {t}": at for t, at in zip(TIMES, at_times) if t in (100, 700)}
    table = as_table(described | {"random t": all_timesteps})
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
    n, loss = beyond.gradients_kept(vae), partial(vae_loss, kl_weight=kl_weight)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    steps = VAE_STEPS[-1] + 1
    batches = r.fisher_batches(data.x, data.y, steps * r.FISHER_BATCH, r.rng(data.x.device, "vae"))
    for step, batch in enumerate(r.progress(batches, f"VAE, KL x {kl_weight:g}", total=steps)):
        if step in VAE_STEPS:
            mse = vae_loss(vae, *batch, kl_weight=0.0).mean().item()
            history.append(geometry(vae, samples(data, n), loss)[0] | {"mse": mse})
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
        name, at = f"DDPM, {when}", geometry(model, samples(data, n, timesteps))[0]
        axes.axhline(at["top_share"], ls="--", color=f"C{len(numbers) - 1}", label=f"{name}, trained")
        numbers[name] = [at]
    for color, (name, share) in zip(("C0", "C1", "k"), PUBLISHED_SHARE.items()):
        axes.plot(VAE_STEPS[-1], share, "*", ms=12, color=color, label=f"paper, {name}: about {share:.0%}")
    axes.set(xlabel="training steps of the VAE", ylabel=r"$\lambda_1$ / trace of $F$", ylim=(0, 1.05))
    axes.set_xscale("symlog", linthresh=VAE_STEPS[1])
    axes.set_xticks(VAE_STEPS, [str(step) for step in VAE_STEPS])
    axes.set_xlim(-3, 1.4 * VAE_STEPS[-1])
    add_legend(axes, ncols=3)
    table = as_table({name: at[-1] for name, at in numbers.items() if name != "steps"})
    return {"samples": n, "table": table} | numbers, figure


def second_task(cfg: r.Settings, state: r.State, tasks: list[r.Data], u: Tensor) -> dict[str, list[float]]:
    """Learn the second task from a state at the first's end, and watch each step along the unit vector u.

    -> after each step: "position" u^T (theta - theta*); "average", the same of the weights' running average
    with decay 0.99; "share" of the step's squared length that lies along u. cfg.lr_decay is as in a run.
    """
    state = copy.deepcopy(state)
    state.task, state.epoch, state.step = 1, 0, 0
    r.begin_task(cfg, state)
    theta_star = theta = average = r.flat(r.trainable(state.model)).detach()
    shape, num_old = tasks[1].x.shape[1:], int(tasks[1].y.min())
    replay = r.replay_pool(cfg, state.teacher, shape, num_old)
    watched = {"position": [], "average": [], "share": []}
    size = min(cfg.batch_size, len(tasks[1].y))
    steps = cfg.epochs * (len(tasks[1].y) // size)
    state.model.train()
    gradient_of = r.gradient_function(cfg)
    networks = state.model, state.teacher, state.penalty, state.optimizer
    for epoch in r.progress(range(cfg.epochs), f"lambda {state.penalty.lam:g}", unit="epoch"):
        for batch in r.epoch_batches(tasks[1], replay, size, cfg.seed, state.task, epoch):
            if cfg.lr_decay == "linear":
                state.optimizer.param_groups[0]["lr"] = cfg.lr * (1 - state.step / steps)
            r.train_step(*networks, batch, gradient_of)
            state.step += 1
            before, theta = theta, r.flat(r.trainable(state.model)).detach()
            average = torch.lerp(average, theta, 0.01)
            move = theta - before
            watched["position"].append(float(u @ (theta - theta_star)))
            watched["average"].append(float(u @ (average - theta_star)))
            watched["share"].append(float((u @ move).square() / move.square().sum()))
    return watched


def learn_first_task(cfg: r.Settings, data: r.Data) -> tuple[r.State, list[r.Data]]:
    """Learn the first task of a run with these settings. -> the state at its end, and all tasks."""
    tasks, state = r.split_tasks(data, cfg.tasks), r.new_state(cfg, data, data.x.device)
    r.begin_task(cfg, state)
    with tempfile.TemporaryDirectory() as folder:  # for train_task's checkpoints
        cfg.out = Path(folder)
        steps = r.steps_of(cfg, tasks[0])[1]
        r.train_task(cfg, state, tasks[0], None, r.progress(total=steps, unit="step"))
    return state, tasks


def figure_movement(_: None, data: r.Data, cfg: r.Settings) -> tuple[dict, Figure]:
    """Show how the weights move along mu of the first task while the second is learned, lambda 0 and lambda."""
    state, tasks = learn_first_task(cfg, data)
    generator = r.rng(data.x.device, cfg.seed, "fisher", 0)
    fisher = r.rank1_fisher(state.model, tasks[0].x, tasks[0].y, cfg.fisher_samples, generator)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = {"samples": cfg.fisher_samples, "weights": len(fisher[0])}
    for i, lam in enumerate((0.0, cfg.lam)):
        state.penalty = r.Rank1Penalty(lam)
        state.penalty.add(fisher, state.model)
        watched = second_task(cfg, state, tasks, F.normalize(fisher[0], dim=0))
        half = len(watched["share"]) // 2
        numbers[f"lambda {lam:g}"] = {
            "mean share": sum(watched["share"]) / len(watched["share"]),
            "spread in the second half": float(torch.tensor(watched["position"])[half:].std()),
            "spread of the average": float(torch.tensor(watched["average"])[half:].std()),
        } | watched
        left.plot(watched["position"], color=f"C{i}", lw=0.8, label=rf"weights, $\lambda$ = {lam:g}")
        left.plot(
            watched["average"], "--", color=f"C{i}", label=rf"their average (0.99), $\lambda$ = {lam:g}"
        )
        window = max(1, len(watched["share"]) // 30)
        smooth = torch.tensor(watched["share"]).unfold(0, window, window).mean(1)
        middles = window * torch.arange(len(smooth)) + window // 2
        right.plot(middles, smooth, "o-", ms=3, label=rf"$\lambda$ = {lam:g}")
    right.axhline(1 / numbers["weights"], color="grey", ls=":", label="a random direction")
    left.set(xlabel="step of the second task", ylabel=r"$u^T(\theta - \theta^*)$, $u = \mu / \|\mu\|$")
    right.set(xlabel="step of the second task", ylabel="share of a step along $u$", yscale="log")
    add_legend(left, ncols=2)
    add_legend(right, ncols=3)
    return numbers, figure


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
    if not (run / "result.json").exists():
        r.stop(f"{run} holds no finished run (result.json): name another, or train it with --out {run}")
    paper = {name: row[0] for name, row in r.SETTINGS.items()}  # for what an older result.json lacks
    config = r.read_result(run / "result.json")["config"]
    cfg = r.Settings(**paper | config | {"data_dir": data_dir, "device": device})
    data = load_data(cfg)
    try:
        model = r.new_state(cfg, data, data.x.device).model.eval()
        model.load_state_dict(torch.load(run / "model.pt", map_location="cpu", weights_only=True))
    except r.DAMAGED as error:
        broken = f"{run / 'model.pt'} is missing, damaged or of another network ({type(error).__name__})"
        r.stop(f"{broken}: train it anew with --out {run} --fresh, or name another run")
    return cfg, model, data


def main(argv: list[str] | None = None) -> None:
    """Make a figure of a finished run: the picture and its numbers."""
    parser = argparse.ArgumentParser("python -m results.geometry", description=__doc__.split("\n\n")[0])
    parser.error = r.stop
    parser.add_argument("figure", choices=FIGURES, help="the paper's number of it, or the VAE control")
    parser.add_argument(
        "run", metavar="RUN", type=Path, nargs="?", help="folder of a finished run; or, without"
    )
    parser.add_argument("--first-task", metavar="FLAGS", help='"--lr 1e-3 --seed 7": of which run')
    parser.add_argument("--to", metavar="NAME", help="of the files (default: results/figure1-<dataset>, ..)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the datasets are")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, .. or mps")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.first_task is None) or (args.run and args.figure == "movement"):
        r.stop("name a finished run, or else --first-task FLAGS (movement: always)")
    if args.run:
        cfg, model, data = load_run(args.run, args.data_dir, args.device)
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
    name = args.to or f"results/figure{args.figure}-{cfg.dataset}"
    if table := numbers.pop("table", None):
        with r.whole(Path(f"{name}.md")) as file:
            file.write(table.encode())
    r.write_json(Path(f"{name}.json"), {"figure": args.figure, "config": r.settings_of(cfg)} | numbers)
    with r.whole(Path(f"{name}.png")) as file:
        figure.savefig(file, dpi=120)
    print(f"In {name}.png, {name}.json")


if __name__ == "__main__":
    main()
