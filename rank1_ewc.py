"""Class-incremental continual learning of a diffusion model: generative distillation and rank-1 EWC.

"Avoid Catastrophic Forgetting with Rank-1 Fisher from Diffusion Models", Wang, Gupta, Dong, MacLellan, ICLR
2026, arXiv 2509.23593. Part I is the paper, Part II what it learns with (network, data, FID), Part III what a
run needs besides (settings, checkpoints, processes, command line).

    python rank1_ewc.py --epochs 90                               # 8x8 digits: a minute or two on a laptop
    python rank1_ewc.py --dataset mnist --method rank1            # the paper's run: hours on a GPU
    torchrun --nproc_per_node 8 rank1_ewc.py --dataset mnist      # on 8 GPUs; --help lists every setting

The paper's equations, and where they are:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          add_noise
    the denoising loss of one sample, l                    per_sample_loss
    DDIM, from noise to an image                           ddim_sample
    replay: samples of old classes by the teacher          replay_pool
    L_T and L_GD                                           losses
    Propositions 1 and 2, Theorem 1: F ~ c* mu mu^T        rank1_fisher
    F_jj = E[g_j^2]                                        diagonal_fisher
    (lam/2) sum_k c*_k (mu_k^T (theta - theta*_k))^2       Rank1Penalty
    (lam/2) sum_kj F_k,jj (theta_j - theta*_k,j)^2         DiagonalPenalty
    the rows of Table 1                                    METHODS
    L = L_T + L_GD + L_EWC                                 objective
    AFID and forgetting                                    afid_and_forgetting
    teacher, Adam, task after task                         begin_task, run

Symbols: x0 a clean image in [-1, 1], (B, C, H, W); t a timestep in 0..999, (B,); y a class, (B,); eps
Gaussian noise like x0; abar_t how much of x0 is left at t; theta all D weights as one vector, (D,); theta*
the weights at the end of a task; g = dl/dtheta the gradient of one sample's loss, (D,); mu = E[g]; c* the
coefficient of F = E[g g^T] on mu mu^T; lam EWC's lambda; k an old task.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import pickle
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

# ============================================================================================================
# PART I: THE PAPER
# ============================================================================================================

# ---- Diffusion: noise is mixed into an image, and the network learns to find it (DDPM, arXiv 2006.11239).

NUM_STEPS = 1000  # timesteps


@cache
def alphas_cumprod(device: torch.device) -> Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), with beta linear from 1e-4 to 0.02. (1000,) float32."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_STEPS), 0).to(device)


def add_noise(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. x0, eps (B, C, H, W), t (B,) -> (B, C, H, W).

    ValueError: x0 are not floats, but perhaps still uint8.
    """
    if not x0.is_floating_point():
        raise ValueError(f"x0 must be floats in -1..1, not {x0.dtype}: to_float(images)")
    abar = alphas_cumprod(x0.device)[t][:, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def draw_noise(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t ~ U{0..999} (B,) and eps ~ N(0, 1) like x0 (B, C, H, W)."""
    t = torch.randint(NUM_STEPS, (len(x0),), generator=generator, device=x0.device)
    return t, torch.randn(x0.shape, generator=generator, device=x0.device)


def predict_noise(model: Callable, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """eps_theta(x_t, t, y). ValueError if its shape differs from that of x_t: it would broadcast silently."""
    eps = model(x_t.clone(), t, y)  # a copy, as a model may work in place
    if eps.shape != x_t.shape:
        raise ValueError(f"the model must give eps like x_t, {tuple(x_t.shape)}, not {tuple(eps.shape)}")
    return eps


def per_sample_loss(model: Callable, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor) -> Tensor:
    """l_i = mean over pixels of (eps_theta(x_t, t, y) - eps)^2. -> (B,)."""
    return (predict_noise(model, add_noise(x0, t, eps), t, y) - eps).square().flatten(1).mean(1)


@torch.no_grad()
def ddim_sample(model: Callable, noise: Tensor, y: Tensor, steps: int = 50) -> Tensor:
    """DDIM (arXiv 2010.02502) with eta 0: noise (B, C, H, W), y (B,) -> x0 (B, C, H, W) in [-1, 1].

    The same as diffusers' DDIMScheduler: `steps` (1..1000) timesteps ("leading": 980, 960, .., 0 for 50);
    x0_hat is clipped, the direction keeps the unclipped eps_hat, and the last step goes to abar = 1.
    """
    abar, stride, x = alphas_cumprod(noise.device), NUM_STEPS // steps, noise
    for t in range((steps - 1) * stride, -1, -stride):
        same_t = torch.full((len(y),), t, device=y.device)
        eps = predict_noise(model, x, same_t, y).float()  # with --bf16 it comes as bfloat16
        x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        abar_next = abar[t - stride] if t else torch.ones_like(abar[0])
        x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps
    return x


# ---- Generative distillation (arXiv 2311.14028): the teacher, a frozen copy of the model after the last
# task, generates images of all old classes. On these the student imitates it; on real images it denoises.


def replay_pool(cfg, teacher: nn.Module, shape: tuple, num_old: int) -> tuple[Tensor, Tensor]:
    """The teacher's samples of classes 0..num_old-1, equally many of each. -> (N, C, H, W) uint8, (N,)."""
    device = next(teacher.parameters()).device
    # As in the authors' code, the n-th image starts from the same noise for every class and after every task.
    generator = rng(device, cfg.seed, "replay pool")
    noise = torch.randn(cfg.replay_per_class, *shape, generator=generator, device=device)
    y = torch.arange(num_old, device=device).repeat_interleave(cfg.replay_per_class)
    return sample_images(cfg, teacher, noise, y, "replay pool", cfg.replay_steps), y


def losses(model, teacher, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """L_T, the denoising loss on the real rows, and L_GD, the distance from the teacher on the replayed rows.

    x0, eps (B, C, H, W), t, y (B,). With a teacher the first half of the rows is real, the second replayed;
    without one (None) L_T is over all rows and L_GD is 0. The student runs once, as in the authors' code.
    ValueError: an odd number of rows with a teacher.
    """
    if teacher is not None and len(y) % 2:
        raise ValueError(f"half of the rows must be real and half replayed, but there are {len(y)}")
    x_t = add_noise(x0, t, eps)
    eps_model = predict_noise(model, x_t, t, y)
    if teacher is None:
        return functional.mse_loss(eps_model, eps), eps.new_zeros(())
    half = len(y) // 2
    with torch.no_grad():
        eps_teacher = predict_noise(teacher, x_t[half:], t[half:], y[half:])
    denoise = functional.mse_loss(eps_model[:half], eps[:half])
    distill = functional.mse_loss(eps_model[half:], eps_teacher)
    return denoise, distill


# ---- Fisher: F = E[g g^T], taken after a task on its real images, says which directions in weight space
# matter to it. It has D x D entries, so something smaller stands in for it.
# The contract of a Fisher, also of one of your own (results/beyond.py adds some):
#   fisher(model, x, y, n, generator, loss=per_sample_loss, shared=False) -> what add() of its penalty takes
# F is that of the trainable weights, in eval mode, and the model is left as it was. x: images (N, C, H, W) as
# to_float takes them; y: classes (N,); n: the number of samples (image, t, eps); generator: on their device.
# loss(model, x0, t, eps, y) -> (B,), of each sample, twice differentiable; your own loss gets x unchanged
# unless it is uint8. shared: torchrun's processes divide the work, as in a run; otherwise each works alone.
# ValueError: a model or images whose F would be wrong. FloatingPointError: a gradient is not finite.


def fisher_batches(x: Tensor, y: Tensor, n: int, generator: torch.Generator) -> Iterator[tuple]:
    """n samples (x0, t, eps, y) in batches: each image once, in random order, before any is repeated."""
    rounds = range(math.ceil(n / len(x)))
    chosen = torch.cat([torch.randperm(len(x), generator=generator, device=x.device) for _ in rounds])
    for index in chosen[:n].split(FISHER_BATCH):
        x0 = to_float(x[index]) if x.dtype == torch.uint8 else x[index]
        yield x0, *draw_noise(x0, generator), y[index]


# Why rank 1? At high noise x_t is nearly all noise, and the best denoiser is a scaled identity (Proposition
# 1). If eps_hat = a(theta) x_t, then g is (a x_t - eps)^T x_t da/dtheta, up to a factor: a number c(x_t)
# times the same vector v for every sample (Proposition 2). So g g^T = c^2 v v^T, F has rank 1, and as mu is a
# multiple of v too, F ~ c* mu mu^T with c* = mu^T F mu / ||mu||^4 and mu^T F mu = E[(mu^T g)^2] (Theorem 1).
# The mu of different t are nearly parallel: one mu, over random t, serves for all. But over all t, as the
# method takes it, F is further from rank 1 than at high noise alone (results/README.md).
def rank1_fisher(model, x, y, n, generator, loss=per_sample_loss, shared=False) -> tuple[Tensor, Tensor]:
    """Theorem 1: mu = E[g] (D,) over n draws and c* = E[(mu^T g)^2] / ||mu||^4, a scalar, over n fresh ones.

    On the same draws as mu, c* would be too large: mu^T g_i then contains ||g_i||^2 / n. No gradient of a
    single sample is needed: with a weight w_i on each loss a backward pass gives G = sum_i w_i g_i, linear in
    w, and the derivative of mu^T G by w is mu^T g_i, of all samples at once.
    """
    with examined(model, x, y, n, loss) as network:  # in eval mode
        theta = trainable(network)
        total = zeros_for_sums(theta)  # the sum of all g_i
        for batch in my_share(fisher_batches(x, y, n, generator), shared):
            each = loss_of_each(network, batch, loss)  # (B,)
            total += flat(torch.autograd.grad(each.sum(), theta, materialize_grads=True))
        mu = all_sum(total, shared) / n
        mu_norm = math.sqrt(dot64(mu, mu))
        if not 0 < mu_norm < math.inf:
            raise FloatingPointError(f"||mu|| is {mu_norm}: no gradient, or one that is not finite")

        u, squares = mu / mu_norm, torch.zeros_like(mu[0])  # mu's direction; the sum of all (u^T g_i)^2
        batches = my_share(fisher_batches(x, y, n, generator), shared)
        for i, batch in enumerate(parts_that_fit(network, batches)):
            with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no second derivative
                each = loss_of_each(network, batch, loss)
                w = torch.ones_like(each, requires_grad=True)
                G = flat(torch.autograd.grad(each, theta, w, create_graph=True, materialize_grads=True))
            (u_g,) = torch.autograd.grad(u @ G.to(u.dtype), w)  # (B,)
            refuse_infinite(u_g)
            squares += u_g.to(u.dtype).square().sum()
            if i == 0:
                compare_with_single_samples(first_gradients(network, batch, loss), u_g, u)
        c_star = all_sum(squares, shared) / n / mu_norm**2  # E[(mu^T g)^2] / ||mu||^4, as mu = ||mu|| u
    return mu, c_star


def diagonal_fisher(model, x, y, n, generator, loss=per_sample_loss, shared=False) -> Tensor:
    """F_jj = E[g_j^2] (D,) over n draws (EWC, arXiv 1612.00796), from the gradients of single samples."""
    with examined(model, x, y, n, loss) as network:
        total = zeros_for_sums(trainable(network))
        for g in gradients(network, my_share(fisher_batches(x, y, n, generator), shared), loss):
            total += g.to(total).square_().sum(0)  # in place: new memory would take longer than the square
    return all_sum(total, shared) / n


# ---- Penalties make it expensive to move along what F says matters. Each is an exact sum over all old tasks.


class Penalty:
    """The contract of a penalty, also of one of your own. lam: EWC's lambda, the weight of the penalty.

    weights: the model, or its trainable weights theta as one vector, flat(trainable(model)), (D,).
    add(fisher, weights), after a task: takes copies of what it keeps; returns numbers for result.json.
    penalty(weights): the scalar L_EWC, 0 before the first add. drift(weights): how far theta is from the
    theta*_k, a vector for result.json. after_step(model, lr), if there is one, follows each optimizer step.
    state_dict() and load_state_dict() carry it through torch.save. ValueError: weights of other shapes.
    """

    def __init__(self, lam: float):
        self.lam, self.shapes = lam, {}  # the shapes of the weights, by name; none before the first add

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        if state.keys() != vars(self).keys():
            raise ValueError(f"this is not the state of a {type(self).__name__}, but {', '.join(state)}")
        vars(self).update(copy.deepcopy(state))


class Rank1Penalty(Penalty):
    """(lam/2) sum_k c*_k (mu_k^T (theta - theta*_k))^2, the paper's rank-1 EWC.

    Of each old task mu_k, c*_k and one number are kept, and only the newest theta*, as the origin:
    mu_k^T (theta - theta*_k) = mu_k^T (theta - origin) + offset_k,  offset_k = mu_k^T (origin - theta*_k).
    """

    def __init__(self, lam: float):
        super().__init__(lam)
        self.mu = self.c_star = self.offset = self.origin = None  # (k, D), (k,), (k,), (D,)

    @torch.no_grad()
    def add(self, fisher: tuple[Tensor, Tensor], weights: nn.Module | Tensor) -> dict[str, float]:
        mu, theta_star = copies(self, fisher[0], weights)
        c_star = torch.as_tensor(fisher[1]).to(mu, copy=True).reshape(())
        if not 0 <= c_star < math.inf:
            raise ValueError(f"c* must be a number from 0 on, not {c_star}")
        if self.origin is None:
            self.mu, self.c_star, self.offset = mu.new_empty(0, len(mu)), mu[:0], mu[:0]
            self.origin = theta_star
        moved = theta_star - self.origin
        offset = self.offset + mu.new_tensor([dot64(old_mu, moved) for old_mu in self.mu])
        self.offset, self.origin = torch.cat([offset, mu.new_zeros(1)]), theta_star
        self.mu, self.c_star = torch.cat([self.mu, mu[None]]), torch.cat([self.c_star, c_star[None]])
        energy = c_star * mu.norm() ** 2  # mu^T F mu / ||mu||^2
        return {"c_star": float(c_star), "mu_norm": float(mu.norm()), "energy": float(energy)}

    def drift(self, weights: nn.Module | Tensor) -> Tensor:
        """mu_k^T (theta - theta*_k) of every old task: the distance along mu_k, times ||mu_k||. -> (k,)."""
        theta = theta_for(self, weights)
        with torch.autocast(theta.device.type, enabled=False):  # bfloat16 would round the distance to 0
            return self.mu @ (theta - self.origin).to(self.mu.dtype) + self.offset

    def __call__(self, weights: nn.Module | Tensor) -> Tensor:
        if self.origin is None:
            return theta_for(self, weights).new_zeros(())
        return self.lam / 2 * (self.c_star * self.drift(weights).square()).sum()


class DiagonalPenalty(Penalty):
    """(lam/2) sum_k sum_j F_k,jj (theta_j - theta*_k,j)^2, EWC (arXiv 1612.00796).

    The square completed: sum_k F_k (theta - theta*_k)^2 = H (theta - center)^2 + rest, with H = sum_k F_k.
    """

    def __init__(self, lam: float):
        super().__init__(lam)
        self.H, self.center, self.rest = 0.0, 0.0, 0.0  # no task yet

    @torch.no_grad()
    def add(self, fisher: Tensor, weights: nn.Module | Tensor) -> dict[str, float]:
        fisher, theta_star = copies(self, fisher, weights)
        H, moved = self.H + fisher, theta_star - self.center
        weight = torch.where(H > 0, fisher / H, 0.0)  # of this theta* in the weighted mean of all
        self.rest += dot64(self.H * weight, moved.square())
        self.H, self.center = H, self.center + weight * moved
        return {"trace": float(fisher.sum())}

    def drift(self, weights: nn.Module | Tensor) -> Tensor:
        """(sum_k sum_j F_k,jj (theta_j - theta*_k,j)^2)^1/2, one number for all old tasks. -> (1,)."""
        return ((self.H * (theta_for(self, weights) - self.center).square()).sum() + self.rest).sqrt()[None]

    def __call__(self, weights: nn.Module | Tensor) -> Tensor:
        return self.lam / 2 * ((self.H * (theta_for(self, weights) - self.center).square()).sum() + self.rest)


# ---- Methods: the rows of Table 1, and two baselines. results/beyond.py adds rows of its own.


class Method(NamedTuple):
    """What protects the old classes: replay, imitation of the teacher on it, a Fisher with its penalty."""

    replay: bool = False
    distill: bool = False
    fisher: Callable | None = None
    penalty: type[Penalty] | None = None
    joint: bool = False  # not continual: all classes at once


METHODS = {
    "joint": Method(joint=True),
    "finetune": Method(),
    "replay": Method(replay=True),
    "gd": Method(replay=True, distill=True),
    "diag-only": Method(fisher=diagonal_fisher, penalty=DiagonalPenalty),
    "rank1-only": Method(fisher=rank1_fisher, penalty=Rank1Penalty),
    "diag": Method(replay=True, distill=True, fisher=diagonal_fisher, penalty=DiagonalPenalty),
    "rank1": Method(replay=True, distill=True, fisher=rank1_fisher, penalty=Rank1Penalty),
}


# ---- Training: the objective, one step, the epochs of a task, all tasks.


def objective(model: nn.Module, teacher: nn.Module | None, penalty: Penalty | None, batch: tuple) -> tuple:
    """L = L_T + L_GD + L_EWC of a batch (x0, t, eps, y), rows as in losses(): its three terms, scalars."""
    denoise, distill = losses(model, teacher, *batch)
    ewc = penalty(model) if penalty else torch.zeros_like(denoise)
    return denoise, distill, ewc


def terms_and_gradient(model, teacher, penalty, batch, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """The objective's terms (3,) and the gradient (D,) of their sum; dtype bfloat16: for tensor cores."""
    with torch.autocast(batch[0].device.type, dtype, enabled=dtype != torch.float32):
        terms = torch.stack(objective(model, teacher, penalty, batch))
    return terms.detach(), flat(torch.autograd.grad(terms.sum(), trainable(model)))


def train_step(model, teacher, penalty, optimizer, batch, gradient_of=terms_and_gradient) -> Tensor:
    """One step of the optimizer down the sum of the objective's terms. -> the terms (3,), before the step.

    gradient_of: terms_and_gradient, or how a run computes it (several processes, bfloat16, a CUDA graph).
    """
    terms, gradient = gradient_of(model, teacher, penalty, batch)
    theta = trainable(model)
    for p, g in zip(theta, shaped(gradient, theta)):
        p.grad = g
    optimizer.step()
    if hasattr(penalty, "after_step"):
        penalty.after_step(model, optimizer.param_groups[0]["lr"])
    return terms


def epoch_batches(task: "Data", replay: tuple | None, size: int, *when: int) -> Iterator[tuple]:
    """An epoch's batches (x0, t, eps, y): `size` real images each, then as many replayed ones, if any.

    when: the run's seed, the number of the task and that of the epoch: all draws depend on these.
    """
    x, y, device = task.x, task.y, task.x.device
    purposes = ("order", "noise", "replay", "dropout")
    draw = {purpose: rng(device, when[0], purpose, *when[1:]) for purpose in purposes}
    torch.manual_seed(draw["dropout"].initial_seed() + rank())  # dropout knows only the global generator
    order = torch.randperm(len(x), generator=draw["order"], device=device)
    for index in order[: len(x) // size * size].split(size):  # full batches: a random remainder is left out
        images, labels = x[index], y[index]
        if replay:
            old_x, old_y = replay
            old = torch.randint(len(old_y), (size,), generator=draw["replay"], device=device)
            images, labels = torch.cat([images, old_x[old]]), torch.cat([labels, old_y[old]])
        x0 = to_float(images)
        yield x0, *draw_noise(x0, draw["noise"]), labels


def train_task(cfg, state: "State", task: "Data", replay: tuple | None, bar: tqdm) -> None:
    """Train the task's remaining epochs. With --ema it ends with the average of its weights."""
    model, optimizer = state.model, state.optimizer
    teacher = state.teacher if METHODS[cfg.method].distill else None
    (size, steps), gradient_of = steps_of(cfg, task), gradient_function(cfg)
    while state.epoch < cfg.epochs:
        model.train()
        terms = []
        with timed(state, "train"):
            for batch in epoch_batches(task, replay, size, cfg.seed, state.task, state.epoch):
                if cfg.lr_decay == "linear":
                    optimizer.param_groups[0]["lr"] = cfg.lr * (1 - state.step / steps)
                terms.append(train_step(model, teacher, state.penalty, optimizer, batch, gradient_of))
                if cfg.ema:
                    state.average.lerp_(flat(trainable(model)).detach(), 1 - cfg.ema)
                state.step += 1
                bar.update()
        end_epoch(cfg, state, torch.stack(terms).mean(0).tolist(), bar)
    if cfg.ema:
        for p, values in zip(trainable(model), shaped(state.average, trainable(model))):
            p.data.copy_(values)


def evaluate(cfg, model: nn.Module, tasks: list["Data"], features: Callable, device) -> list[np.ndarray]:
    """FID features of samples, for each task as many as it has test images, with the same labels."""
    sampled = []
    for k, task in enumerate(tasks):  # the same noise after every task: only the model changes a FID
        noise = torch.randn(task.test_x.shape, generator=rng(device, cfg.seed, "FID", k), device=device)
        images = sample_images(cfg, model, noise, task.test_y.to(device), f"samples of task {k + 1}")
        sampled.append(features(images))
    return sampled


def afid_and_forgetting(fid: list[list[float | None]]) -> tuple[list[float], float | None]:
    """fid[j][k]: FID on task k after task j, None for k > j. -> AFID after each task, final forgetting.

    AFID_j = mean over k <= j of FID_k(m_j); forgetting = (1/T) sum_k (FID_k(m_T) - FID_k(m_k)).
    Joint training has one row, of all tasks, and forgets nothing: None. (Its number in the paper's Table 1
    is one FID of all classes, fid_pooled.)
    """
    matrix = np.array(fid, dtype=float)  # None becomes nan
    forgetting = float((matrix[-1] - matrix.diagonal()).mean()) if len(matrix) == len(matrix[0]) else None
    return np.nanmean(matrix, axis=1).tolist(), forgetting


def begin_task(cfg, state: "State") -> None:
    """The current model becomes the frozen teacher and the start of --ema's average; Adam starts afresh."""
    if METHODS[cfg.method].replay and state.task > 0:
        state.teacher = copy.deepcopy(state.model).eval().requires_grad_(False)
    fused = cfg.device == "cuda" or None  # all weights in a few kernels
    state.optimizer = torch.optim.Adam(state.model.parameters(), lr=cfg.lr, fused=fused)
    state.average = flat(trainable(state.model)).detach() if cfg.ema else None


def run(cfg, data: "Data", features: Callable[[Tensor], np.ndarray], device: torch.device) -> dict:
    """Learn task after task, from the last checkpoint on, and measure after each. -> what result.json holds.

    data: all images, sorted by class; features: images uint8 -> FID features (N, d).
    """
    method, state = METHODS[cfg.method], new_state(cfg, data, device)
    data, state.class_order = order_classes(cfg, data)
    tasks = split_tasks(data, cfg.tasks)
    stages = [data] if method.joint else tasks  # what is learned, one after the other
    steps = [steps_of(cfg, stage)[1] for stage in stages]
    load_checkpoint(cfg, state)  # if there is one, into the state
    real = [features(task.test_x) for task in tasks]
    state.fid_real = state.fid_real or fid_of_training_images(cfg, tasks, real, features)
    done = sum(steps[: state.task]) + state.step
    with progress(initial=done, total=sum(steps), unit="step", smoothing=0) as bar:
        for k in range(state.task, len(stages)):
            task, seen, replay = stages[k].to(device), tasks if method.joint else tasks[: k + 1], None
            if state.epoch == 0:
                begin_task(cfg, state)
            if method.replay and k > 0:  # old classes are those below the task's: they come in label order
                with timed(state, "replay"):
                    replay = replay_pool(cfg, state.teacher, task.x.shape[1:], num_old=int(task.y.min()))
            bar.set_description(f"task {k + 1}/{cfg.tasks} {cfg.method}")
            train_task(cfg, state, task, replay, bar)

            # The Fisher and theta* are those of the weights as they now are, with --ema the average.
            if method.penalty and k > 0:
                state.drift.append(state.penalty.drift(state.model).tolist())
            if method.penalty and k + 1 < cfg.tasks:
                images = task.x, task.y, cfg.fisher_samples, rng(device, cfg.seed, "fisher", k)
                with timed(state, "fisher"):
                    fisher = method.fisher(state.model, *images, shared=True)
                state.fisher.append(state.penalty.add(fisher, state.model))

            with timed(state, "fid"):
                sampled = evaluate(cfg, state.model, seen, features, device)
                row = [frechet_distance(a, b) for a, b in zip(real, sampled)]
            state.fid.append(row + [None] * (cfg.tasks - len(row)))
            if method.joint:
                state.fid_pooled = frechet_distance(np.concatenate(real), np.concatenate(sampled))
            show_progress(cfg, state, seen, device)
            state.task, state.epoch, state.step = k + 1, 0, 0
            state.optimizer = state.teacher = state.average = None  # the next task begins with new ones
            save_checkpoint(cfg, state)
    return finish(cfg, state)


# ============================================================================================================
# PART II: WHAT IT LEARNS WITH. The paper has ended; here are its network, its data and its metric.
# ============================================================================================================

# ---- Denoiser: eps_theta(x_t, t, y). The UNet of DDPM (arXiv 2006.11239) as diffusers' UNet2DModel builds it
# in the paper's configuration; the parameters carry the same names, so a state_dict fits both ways.
HEAD_CHANNELS, PAPER_CHANNELS = 8, (128, 256, 256, 256)


class GroupNorm(nn.GroupNorm):  # in its input's precision: on a GPU autocast would go to float32 and back
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


class Resnet(nn.Module):  # time and class come in at its middle; `resample` acts on both its paths
    def __init__(self, c_in, c_out, temb_channels, groups, dropout, resample=None):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1, self.conv1 = GroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, c_out)
        self.norm2, self.dropout = GroupNorm(groups, c_out), nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.resample(functional.silu(self.norm1(x))))
        h = h + self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        return self.conv_shortcut(self.resample(x)) + self.conv2(self.dropout(functional.silu(self.norm2(h))))


class Attention(nn.Module):  # between all pixels, in heads of HEAD_CHANNELS channels
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h, heads = self.group_norm(x).flatten(2).transpose(1, 2), (-1, HEAD_CHANNELS)  # (B, HW, C)
        q, k, v = (to(h).unflatten(2, heads).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        h = functional.scaled_dot_product_attention(q, k, v)  # each (B, heads, HW, 8)
        return x + self.to_out(h.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


class UNet(nn.Module):
    """Class-conditional denoiser, forward(x_t, t, y) -> eps. At its defaults the paper's network.

    x_t, eps: (B, in_channels, H, W), H, W multiples of 2^(levels - 1); t: (B,) int in 0..999; y: (B,) int in
    0..num_classes-1. 37,191,681 parameters for 1 channel and 10 classes. ValueError: `channels` do not fit.
    """

    def __init__(self, in_channels, num_classes, channels=PAPER_CHANNELS, layers_per_block=2, dropout=0.0):
        super().__init__()
        first, below, temb_channels = channels[0], channels[-1], 4 * channels[0]
        groups = max(8, first // 4)  # 32 of the paper's 128 channels, 8 of its small network's 16
        multiple = math.lcm(groups, HEAD_CHANNELS)
        if any(c % multiple for c in channels):
            raise ValueError(f"channels {channels} must be multiples of {multiple}, for norms and attention")
        resnet = partial(Resnet, temb_channels=temb_channels, groups=groups, dropout=dropout)

        def stage(level, c, inputs):  # with attention after each block at the third level (8x8 of 32x32)
            resnets = nn.ModuleList([resnet(c_in, c) for c_in in inputs])
            attentions = [Attention(c, groups) if level == 2 else nn.Identity() for _ in inputs]
            return nn.ModuleDict({"resnets": resnets, "attentions": nn.ModuleList(attentions)})

        def resample(level, c, up):  # a 3x3 convolution; at the level with attention a residual block
            twice = nn.Upsample(scale_factor=2) if up else nn.Identity()
            if level == 2:
                return resnet(c, c, resample=twice if up else nn.AvgPool2d(2))
            conv = nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1)
            return nn.Sequential(OrderedDict(twice=twice, conv=conv))

        embed = nn.Linear(first, temb_channels), nn.SiLU(), nn.Linear(temb_channels, temb_channels)
        self.time_embedding = nn.Sequential(OrderedDict(zip(("linear_1", "act", "linear_2"), embed)))
        self.class_embedding = nn.Embedding(num_classes, temb_channels)
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [first]
        for level, c in enumerate(channels):
            self.down_blocks.append(stage(level, c, [skips[-1]] + [c] * (layers_per_block - 1)))
            down = [resample(level, c, up=False)] if level + 1 < len(channels) else []
            self.down_blocks[-1]["downsamplers"] = nn.ModuleList(down)
            skips += [c] * (layers_per_block + len(down))
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList([resnet(below, below) for _ in range(2)])})
        self.mid_block["attentions"] = nn.ModuleList([Attention(below, groups)])
        for level, c in reversed([*enumerate(channels)]):
            inputs = [c_in + skips.pop() for c_in in [below] + [c] * layers_per_block]
            self.up_blocks.append(stage(level, c, inputs))
            up = [resample(level, c, up=True)] if level > 0 else []
            self.up_blocks[-1]["upsamplers"], below = nn.ModuleList(up), c
        self.conv_norm_out = GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = self.conv_in.out_channels // 2  # the number of frequencies
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
        temb = self.time_embedding(torch.cat([angle.cos(), angle.sin()], 1)) + self.class_embedding(y)
        skips = [self.conv_in(x)]
        for level in self.down_blocks:
            for resnet, attention in zip(level["resnets"], level["attentions"]):
                skips.append(attention(resnet(skips[-1], temb)))
            for down in level["downsamplers"]:
                skips.append(down(skips[-1], temb) if isinstance(down, Resnet) else down(skips[-1]))
        (first, second), (attention,) = self.mid_block["resnets"], self.mid_block["attentions"]
        x = second(attention(first(skips[-1], temb)), temb)
        for level in self.up_blocks:
            for resnet, attention in zip(level["resnets"], level["attentions"]):
                x = attention(resnet(torch.cat([x, skips.pop()], 1), temb))
            for up in level["upsamplers"]:
                x = up(x, temb) if isinstance(up, Resnet) else up(x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


# ---- Data. Held as uint8, class after class; a task's training images lie on the device while it is learned,
# and are turned to [-1, 1] a batch at a time.
class Data(NamedTuple):
    """Images (N, C, H, W) uint8 in 0..255 and labels (N,) int64, to train and to test; load_data sorts."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> "Data":
        return Data(*(v.to(device) for v in self))


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]; floats in it are returned as they are. ValueError: all else."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    low, high = float(images.min()), float(images.max())
    if not (images.is_floating_point() and -1 <= low < 0 and high <= 1):
        found = f"{images.dtype} from {low:g} to {high:g}"
        raise ValueError(f"images must be uint8 in 0..255, or floats in -1..1 with some below 0, not {found}")
    return images


def to_uint8(x: Tensor) -> Tensor:
    if not x.isfinite().all():  # nan would become black, and its FID a number that looks like others
        raise FloatingPointError("a generated image is not finite")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_digits(_: Path) -> Data:
    """scikit-learn's 1,797 digits, 1x8x8: 800 for testing, drawn class by class with a fixed seed."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    x, y = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None], digits.target  # (1797, 1, 8, 8)
    x, test_x, y, test_y = model_selection.train_test_split(x, y, test_size=800, stratify=y, random_state=0)
    return Data(*map(torch.from_numpy, (x, y, test_x, test_y)))


def load_torchvision(dataset: str | type, data_dir: Path) -> Data:
    """A dataset of torchvision's, 32x32: MNIST's 28x28 images are padded by 2. Downloads what is missing."""
    import torchvision

    dataset = getattr(torchvision.datasets, dataset) if isinstance(dataset, str) else dataset
    train, test = (dataset(data_dir, train=train, download=True) for train in (True, False))
    x, y, test_x, test_y = map(torch.as_tensor, (train.data, train.targets, test.data, test.targets))
    if x.ndim == 3:  # (N, 28, 28)
        x, test_x = (functional.pad(images, (2, 2, 2, 2))[..., None] for images in (x, test_x))
    return Data(x.permute(0, 3, 1, 2), y, test_x.permute(0, 3, 1, 2), test_y)


def load_imagenet32(data_dir: Path) -> Data:
    """The downsampled ImageNet (arXiv 1707.08819), 3x32x32, from its npz files: 12 GB of host memory."""
    parts = []
    for name in [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]:
        path = data_dir / "imagenet32" / name
        with or_stop(f"{path} is missing or damaged", "get it anew, or name another --data-dir"):
            with np.load(path, allow_pickle=False) as file:
                x, y = file["data"], file["labels"].astype(np.int64)  # in channel, row, column order
            if x.dtype != np.uint8 or x.shape != (len(y), 3072):
                raise ValueError(f"data is {x.dtype} {x.shape}, not uint8 ({len(y)}, 3072)")
        parts.append((torch.from_numpy(x).view(-1, 3, 32, 32), torch.from_numpy(y) - 1))  # labels from 1 on
    return Data(*map(torch.cat, zip(*parts[:-1])), *parts[-1])


PUBLISHED = dict.fromkeys(("mnist", "cifar10", "imagenet32"))  # the digests of what was published, if known
PUBLISHED |= {"digits": "aa07cdaa662c", "fashion": "b46905128f67"}
IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte (four files, plain or .gz)"
LOADERS = {  # name: (data_dir -> Data, the files that it reads there)
    "digits": (load_digits, ""),
    "mnist": (partial(load_torchvision, "MNIST"), f"MNIST/raw/{IDX}"),
    "fashion": (partial(load_torchvision, "FashionMNIST"), f"FashionMNIST/raw/{IDX}"),
    # CIFAR-10's files are pickles: torchvision reads only those with the right MD5.
    "cifar10": (partial(load_torchvision, "CIFAR10"), "cifar-10-python.tar.gz"),
    "imagenet32": (load_imagenet32, "imagenet32/{train_data_batch_1..10,val_data}.npz"),
}


def refuse_unfit(data: Data) -> None:
    """ValueError, which says what was found, unless all is as Data describes it and fits together."""
    told = lambda v: f"{type(v).__name__} {getattr(v, 'dtype', '')} {tuple(getattr(v, 'shape', ()))}"
    parts = ("training", *data[:2]), ("test", *data[2:])
    for kind, x, y in parts:
        if not (torch.is_tensor(x) and x.dtype == torch.uint8 and x.ndim == 4 and x.shape[2] == x.shape[3]):
            raise ValueError(f"{kind} images must be a Tensor torch.uint8 (N, C, H, H), not {told(x)}")
        if not (torch.is_tensor(y) and y.dtype == torch.int64 and y.ndim == 1):
            raise ValueError(f"{kind} labels must be a Tensor torch.int64 (N,), not {told(y)}")
        if not (x.numel() and len(x) == len(y)):
            raise ValueError(f"{kind} images are {told(x)}, and there are {len(y)} {kind} labels")
        if y.min() < 0 or y.max() >= len(y):
            raise ValueError(f"{kind} labels must be 0, 1, 2, .., not {int(y.min())} to {int(y.max())}")
    if data.x.shape[1:] != data.test_x.shape[1:]:
        raise ValueError(f"training images are {told(data.x)}, test images {told(data.test_x)}")
    # A number for each image, exact as it is an integer below 2^53, so that equal images have equal ones.
    factors = torch.randint(2**31, (data.x[0].numel(),), generator=rng(data.x.device, "images")).double()
    codes = lambda x: torch.cat([part.flatten(1).double() @ factors for part in x.split(1000)])
    if (share := torch.isin(codes(data.test_x), codes(data.x)).double().mean()) > 0.5:
        raise ValueError(f"{share:.0%} of the test images are training images")
    classes = int(max(data.y.max(), data.test_y.max())) + 1
    for kind, _, y in parts:
        counts = y.bincount(minlength=classes)
        if counts.min() < 2:  # an FID needs two images
            few = f"label {int(counts.argmin())} stands at {int(counts.min())} {kind} images"
            raise ValueError(f"labels must be 0, 1, 2, .., each at two images or more, but {few}")


def digest(data: Data) -> str:
    """12 hex digits that say which images and labels these are."""
    sha = hashlib.sha256()
    for v in data:
        sha.update(v.cpu().contiguous().numpy())
    return sha.hexdigest()[:12]


def load_data(name: str, data_dir: Path) -> Data:
    """A dataset, sorted by class. Stops if it cannot be read, or images and labels do not fit together."""
    load, files = LOADERS[name]
    advice = f"get {data_dir / files}, or name another --data-dir" if files else "look at its loader"
    with or_stop(f"{name} cannot be used", advice):
        data = Data(*load(data_dir))
        refuse_unfit(data)
    order, test_order = (y.argsort(stable=True) for y in (data.y, data.test_y))
    data = Data(data.x[order], data.y[order], data.test_x[test_order], data.test_y[test_order])
    found = digest(data)
    for other in PUBLISHED:
        if PUBLISHED[other] == found and name in PUBLISHED and name != other:
            stop(f"the images and labels of {name} are those of {other}: name another --data-dir")
    if PUBLISHED.get(name) not in (None, found):
        print(f"note: the images and labels of {name} are not those that were published")
    return data


def limit_classes(data: Data, n: int) -> Data:
    """The first n images of each class, of those to train and of those to test, of data sorted by class."""
    train, test = (torch.arange(len(y)) - torch.searchsorted(y, y) < n for y in (data.y, data.test_y))
    return Data(data.x[train], data.y[train], data.test_x[test], data.test_y[test])


def order_classes(cfg, data: Data) -> tuple[Data, list[int]]:
    """Number the classes anew with --class-order random. -> data, sorted so; the true class of each label."""
    order = torch.arange(int(data.y.max()) + 1)
    if cfg.class_order == "random":
        order = torch.randperm(len(order), generator=rng(order.device, cfg.seed, "class order"))
    y, test_y = order.argsort()[data.y], order.argsort()[data.test_y]
    by, test_by = y.argsort(stable=True), test_y.argsort(stable=True)
    return Data(data.x[by], y[by], data.test_x[test_by], test_y[test_by]), order.tolist()


def split_tasks(data: Data, tasks: int) -> list[Data]:
    """The classes in label order, equally many per task: views, not copies, of data sorted by class."""
    classes = int(data.y.max()) + 1
    if classes % tasks:
        stop(f"--tasks {tasks}: {classes} classes cannot be shared out equally, choose a divisor")
    n, m = (y.bincount().view(tasks, -1).sum(1).tolist() for y in (data.y, data.test_y))  # of each task
    return [*map(Data, data.x.split(n), data.y.split(n), data.test_x.split(m), data.test_y.split(m))]


# ---- Metric: FID of a task's test images against as many samples with the same labels (arXiv 1706.08500), on
# Inception features or, with no download, on a small classifier's. features(images uint8) -> (N, d) float.
def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features (N_a, d), (N_b, d), both N >= 2."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise FloatingPointError("the features of some images are not finite")
    # With A, B the centred features over sqrt(N - 1), M = A B^T, the last trace is that of (M M^T)^1/2: from
    # eigenvalues, as a matrix square root is slow and fails where N < d. QR's R has the same A^T A in d rows.
    A, B = ((v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (a, b))
    A, B = (np.linalg.qr(v, mode="r") if len(v) > v.shape[1] else v for v in (A, B))
    M = A @ B.T
    cross = np.sqrt(np.linalg.eigvalsh(M @ M.T).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.square(A).sum() + np.square(B).sum() - 2 * cross)


@torch.no_grad()
def in_parts(network: Callable, images: Tensor, device: torch.device) -> np.ndarray:
    found = torch.cat([network(part.to(device)).float().cpu() for part in images.split(200)]).numpy()
    if not np.isfinite(found).all():
        stop("the FID's network gives features that are not finite: get or make its weights anew")
    return found


def inception_features(device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """images (N, 1 or 3, H, W) uint8 -> Inception features (N, 2048). Stops without the weights."""
    import cleanfid.features

    advice = "put a whole inception-2015-12-05.pt into /tmp, or take --fid classifier"
    with or_stop("no Inception weights", advice):
        # This network of clean-fid's (arXiv 2104.11222) resizes inside, as for the published numbers.
        network = cleanfid.features.build_feature_extractor("legacy_tensorflow", device, False)
    return lambda images: in_parts(lambda v: network(v.expand(-1, 3, -1, -1).float()), images, device)


def classifier_features(name: str, data: Data, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """images uint8 -> features (N, 64) of a small CNN, trained once on the real images, then cached."""
    torch.manual_seed(0)
    # SiLU, not ReLU: a unit that is dead on two classes would make their covariance singular.
    layers = [nn.Conv2d(data.x.shape[1], 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU()]
    layers += [nn.Flatten(), nn.Linear(64 * math.ceil(data.x.shape[2] / 4) ** 2, 64), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(64, int(data.y.max()) + 1)).to(device)
    with or_stop("no home folder for the FID's classifier", "set XDG_CACHE_HOME to one"):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(cache, "rank1_ewc", f"classifier-{name}-{digest(data)}.pt")
    if not path.exists():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        generator = rng(torch.device("cpu"), "classifier")
        for _ in progress(range(1000), "classifier for the FID", unit="step", leave=False):
            index = torch.randint(len(data.y), (min(128, len(data.y)),), generator=generator)
            optimizer.zero_grad()
            x, y = data.x[index].to(device), data.y[index].to(device)
            functional.cross_entropy(model(to_float(x)), y).backward()
            optimizer.step()
        with whole(path) as file:
            torch.save(model.state_dict(), file)
    with or_stop(f"{path} is damaged", "remove it, and it is made again"):
        model.load_state_dict(load_whole(path, device))
    right = in_parts(lambda v: model(to_float(v)), data.test_x, device).argmax(1) == data.test_y.numpy()
    print(f"A small classifier of {name} is right on {right.mean():.1%} of its test images")
    chance = 1 / len(model[-1].bias)
    if right.mean() <= chance + 2 * math.sqrt(chance * (1 - chance) / len(right)):
        stop(f"no better than chance, {chance:.1%}: do these labels of {name} belong to these images?")
    return lambda images: in_parts(lambda v: model[:-1](to_float(v)), images, device)


def fid_features(cfg, data: Data, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """The features that --fid names; cfg.fid_features becomes what they are called in result.json."""
    if cfg.fid == "inception":
        if data.x.shape[1] not in (1, 3):
            stop(f"Inception takes 1 or 3 channels, not {data.x.shape[1]}: --fid classifier")
        cfg.fid_features = "inception, legacy_tensorflow"
        features = inception_features(device)
        classifier_features(cfg.dataset, data, device)  # stops where labels do not belong to their images
        return features
    cfg.fid_features = f"{cfg.dataset}-classifier"
    return classifier_features(cfg.dataset, data, device)


def fid_of_training_images(cfg, tasks: list[Data], real: list, features: Callable) -> list[float]:
    """What a perfect model would score: training images, drawn at random, in the place of samples."""
    generator = rng(torch.device("cpu"), cfg.seed, "real")

    def like_the_test_images(task):  # as many of each class, as far as there are
        for c, n in zip(*task.test_y.unique(return_counts=True)):
            x = task.x[task.y == c]
            yield x[torch.randperm(len(x), generator=generator)[:n]]

    drawn = [torch.cat([*like_the_test_images(task)]) for task in tasks]
    return [frechet_distance(test, features(images)) for test, images in zip(real, drawn)]


# ============================================================================================================
# PART III: A RUN THAT SURVIVES. Settings, theta as a vector, refusals, processes, checkpoints, command line.
# ============================================================================================================

# ---- Settings: a row each. A dataset's row holds only what differs from the paper's main experiments.
Settings = argparse.Namespace
DIGITS = {"epochs": 270, "batch_size": 64, "lr": 4e-3, "lr_decay": "linear", "lam": 10.0, "fid": "classifier"}
DIGITS |= {"channels": [16, 32], "layers_per_block": 1, "replay_per_class": 200, "sample_steps": 20}
DIGITS |= {"fisher_samples": 4000}  # 20 of each training image: mu from 200 would be mostly noise
SMALL = DIGITS | {"epochs": 1, "batch_size": 16, "sample_steps": 10, "channels": [16, 32, 32, 32]}
IMAGENET = {"tasks": 20, "epochs": 100, "replay_per_class": 1300}
DATASETS = {"digits": DIGITS, "mnist": {}, "fashion": {}, "cifar10": {}, "imagenet32": IMAGENET}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def folder(text: str) -> Path:
    if not text:
        raise ValueError("a folder without a name")
    return Path(os.path.expanduser(text))  # unlike Path's, it takes a user that there is not


COUNT = (1, 10**7)
SETTINGS = {  # name: (the paper's value, type, smallest and largest or choices if any, help)
    "dataset": ("digits", str, DATASETS, "what is learned: a row of DATASETS"),
    "method": ("rank1", str, METHODS, "how old classes are kept: a row of METHODS"),
    "seed": (0, int, (0, 2**62), "seed of everything that is drawn at random"),
    "tasks": (5, int, COUNT, "number of tasks: the classes are split among them equally, in label order"),
    "class_order": ("label", str, ("label", "random"), "which classes come first: random draws from the seed"),
    "epochs": (200, int, COUNT, "epochs per task"),
    "batch_size": (128, int, COUNT, "real images per step; as many replayed ones come on top"),
    "lr": (2e-4, float, (1e-12, 1e12), "learning rate of Adam, which starts afresh with each task"),
    "lr_decay": ("none", str, ("none", "linear"), "constant, or falling to 0 within each task"),
    "lam": (15000.0, float, (0, 1e20), "EWC's lambda; a smaller network needs a smaller one"),
    "fisher_samples": (10_000, int, COUNT, "samples (image, t, eps) of a task for mu, and as many for c*"),
    "replay_per_class": (5000, int, COUNT, "images of each old class that the teacher generates"),
    "sample_steps": (50, int, (1, NUM_STEPS), "DDIM steps per image; divisors of 1000 start from full noise"),
    "replay_steps": (None, int, (1, NUM_STEPS), "DDIM steps per replayed image (default: sample-steps)"),
    "ema": (0.0, float, (0, 0.99999), "decay of the average of its weights that a task ends with; 0: none"),
    "channels": ([*PAPER_CHANNELS], numbers, (1, 4096), "channels of the UNet at each level, as in 16,32"),
    "layers_per_block": (2, int, (1, 100), "residual blocks per level"),
    "dropout": (0.0, float, (0, 0.99), "in the UNet while it trains; the paper says 0.1, see README"),
    "limit": (None, int, (2, 10**7), "a quick look: at most so many images per class, and less of all else"),
    "small": (False, bool, None, "a small network and one epoch per task, for 32x32 images on a CPU"),
    "fid": ("inception", str, ("inception", "classifier"), "features that the FID is computed on"),
    "accumulate": (1, int, COUNT, "parts that a batch is computed in: more of them need less memory"),
    "bf16": (None, bool, None, "train and sample in bfloat16 (default: on GPUs from Ampere on)"),
    "cuda_graph": (None, bool, None, "start all kernels of a step at once (default: on GPUs with CUDA)"),
    "device": ("auto", str, None, "auto, cpu, cuda, cuda:1, .. or mps"),
    "data_dir": (Path("data"), folder, None, "where the datasets are, or are downloaded to"),
    "out": (None, folder, None, "folder for the results (default: in runs/, with --small in runs-small/)"),
    "fresh": (False, bool, None, "start over and delete the run in --out"),
}
# Settings that may differ when a stopped run is continued: they change rounding and dropout's draws alone.
MAY_CHANGE = ("accumulate", "cuda_graph", "data_dir", "out", "fresh", "small", "fid_features")
RETIRED = {"form": "loss", "fisher_timesteps": [0, NUM_STEPS]}  # of older runs: the values still implemented
SAMPLE_BATCH = {"cpu": 200, "mps": 200, "cuda": 1000}  # generated together; on a CPU 100 and 800 are slower
FISHER_BATCH = 128  # samples of a Fisher computed together
DAMAGED = Exception  # a file that is cut short, or something else than its name says, may raise anything
CHECKPOINT_SECONDS = 60  # a checkpoint is written at the first end of an epoch after so long
QUIET = False  # no progress bars
SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # says which runs come from one code


def stop(message: str) -> NoReturn:
    print(f"rank1_ewc: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def rng(device: torch.device, *purpose: int | str) -> torch.Generator:
    """A generator of its own for each purpose: one draw more in one place changes no other place."""
    digest = hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def or_stop(problem: str, advice: str, kind: type[Exception] = DAMAGED) -> Iterator[None]:
    """An error of this kind ends the program in one line: the problem, the error's own words, the advice."""
    try:
        yield
    except torch.OutOfMemoryError:  # is another problem, and main() says what helps against it
        raise
    except PermissionError as error:
        stop(f"{error.filename} cannot be read or written ({error.strerror})")
    except kind as error:
        stop(f"{problem} ({type(error).__name__}: {error}): {advice}")


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


def load_whole(path: Path, device: torch.device) -> dict:
    """What torch.save wrote. ValueError: a byte of it has changed, or a weight in it is not finite."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # compares the checksums
            raise ValueError(f"{damaged} in it has changed")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # whose words would advise to load it all the same
        raise ValueError("it holds more than numbers") from None
    if not all(v.isfinite().all() for v in content.values() if torch.is_tensor(v)):
        raise ValueError("a weight in it is not finite")
    return content


# ---- theta: the weights that are not frozen, as one vector, in the order of model.parameters().
def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself: a forward pass of DistributedDataParallel would wait for the other processes."""
    model = getattr(model, "_orig_mod", model)  # out of torch.compile, which has no second derivative
    return model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else model


def named_weights(weights: nn.Module | Tensor) -> dict[str, Tensor]:
    if torch.is_tensor(weights):  # all of them as a vector already
        return {"theta": weights}
    return {name: p for name, p in unwrapped(weights).named_parameters() if p.requires_grad}


def trainable(model: nn.Module) -> list[Tensor]:
    return [*named_weights(model).values()]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of these tensors as one vector, whatever their memory format; of trainable(model) (D,)."""
    return torch.cat([(v.to_dense() if v.is_sparse else v).reshape(-1) for v in tensors])


def shaped(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The way back: views of a vector in the shapes of these tensors."""
    return [part.view_as(v) for part, v in zip(vector.split([v.numel() for v in like]), like)]


def zeros_for_sums(theta: list[Tensor]) -> Tensor:
    """(D,) zeros in float32 at least: a long sum in bfloat16 would stop growing."""
    zeros = torch.zeros_like(flat(theta))
    return zeros.to(torch.promote_types(zeros.dtype, torch.float32))


def dot64(a: Tensor, b: Tensor) -> float:
    """a^T b summed in float64: over 37 million weights float32 would round small differences away."""
    return float(a.cpu().double() @ b.cpu().double())


def theta_for(penalty: Penalty, weights: nn.Module | Tensor) -> Tensor:
    """theta (D,), if these are the weights that the penalty holds. ValueError, which names one, if not."""
    named, old = named_weights(weights), penalty.shapes
    theta, new = flat(named.values()), {name: [*v.shape] for name, v in named.items()}
    held, changed = sum(map(math.prod, old.values())), [n for n in old | new if old.get(n) != new.get(n)]
    if old and changed and not ("theta" in changed and len(theta) == held):  # a vector has no names
        which = f"{changed[0]} was {old.get(changed[0])}, is {new.get(changed[0])}"
        raise ValueError(f"the penalty holds {held} weights, and these are {len(theta)} others: {which}")
    return theta


def copies(penalty: Penalty, fisher: Tensor, weights: nn.Module | Tensor) -> tuple[Tensor, Tensor]:
    """What add() stores, as copies: the Fisher's vector and theta*, both (D,); and the weights' shapes."""
    theta = theta_for(penalty, weights)
    if fisher.shape != theta.shape:
        raise ValueError(f"{fisher.numel()} numbers of a Fisher, {len(theta)} weights: use trainable(model)")
    if not fisher.isfinite().all():
        raise ValueError("the Fisher is not finite")
    penalty.shapes = {name: [*v.shape] for name, v in named_weights(weights).items()}
    return fisher.detach().clone(), theta.detach().clone()


# ---- What a Fisher refuses: where it would be wrong.
class FisherError(ValueError):
    """The Fisher of this model, or by this method, cannot be taken."""


@contextmanager
def examined(model: nn.Module, x: Tensor, y: Tensor, n: int, loss: Callable) -> Iterator[nn.Module]:
    """The network in eval mode, if a Fisher can be taken; afterwards its modules are as they were before."""
    network = unwrapped(model)
    if not (n > 0 and 0 < len(x) == len(y)):
        raise ValueError(f"cannot take {n} samples of {len(x)} images with {len(y)} classes")
    if not trainable(network):
        raise ValueError("the Fisher is of the trainable weights: all are frozen (model.requires_grad_())")
    if loss is per_sample_loss and x.dtype != torch.uint8:
        to_float(x)
    # A forward pass may change hooks, attributes (the mode is one), and buffers, these also in place.
    modules, buffers = [*network.modules()], [(v, v.clone()) for v in network.buffers()]
    values = (v for m in modules for v in (vars(m), *vars(m).values()))
    held = [(v, copy.copy(v)) for v in values if type(v) in (dict, list, OrderedDict)]
    try:
        for m in modules:
            m.training = False  # not by eval(), in which a LoRA layer may merge its weights
        yield network
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise FisherError(f"the Fisher of this model cannot be taken: {error}") from error
    finally:
        for now, before in held:
            now.clear()
            now.update(before) if isinstance(now, dict) else now.extend(before)
        for now, before in buffers:
            now.copy_(before) if not now.equal(before) else None


def loss_of_each(predict: Callable, batch: tuple, loss: Callable) -> Tensor:
    value = loss(predict, *batch)
    if value.shape != (len(batch[0]),):
        raise ValueError(f"the loss must be a number for each sample, (B,), not {tuple(value.shape)}")
    return value


def first_gradients(model: nn.Module, batch: tuple, loss: Callable) -> list[tuple[Tensor, ...]]:
    """g_i of the first samples, in the shapes of the weights: an ordinary backward pass of each alone."""
    each = (loss_of_each(model, [v[i : i + 1] for v in batch], loss) for i in range(min(5, len(batch[0]))))
    return [torch.autograd.grad(v.sum(), trainable(model), materialize_grads=True) for v in each]


def compare_with_single_samples(exact: list, found: Tensor, u: Tensor | None = None) -> None:
    """ValueError unless found, gradients (B, D) or u^T g_i (B,), agrees with these first gradients."""
    for parts, ours in zip(exact, found):
        g, rounding = flat(parts), 10 * torch.finfo(parts[0].dtype).eps
        if u is None:  # weight by weight, as one may be wrong alone
            small = 1e-3 * g.norm() + 1e-30
            errors = [(a - b).norm() / (b.norm() + small) for a, b in zip(shaped(ours, parts), parts)]
        else:  # in a product rounding all but cancels
            errors = [10 * (ours - u @ g.to(u.dtype)).abs() / (g.norm() + 1e-30)]
        if not all(error <= 0.02 + rounding for error in errors):
            why = "mixes samples (by a batch norm?), draws at random, or hides a weight"
            raise ValueError(f"a sample's gradient differs when it is computed alone: the model {why}")


def refuse_infinite(sums: Tensor) -> None:
    if not sums.sum().isfinite():  # a sum is finite only if all its parts are
        raise FloatingPointError("a gradient is not finite")


def gradients(model: nn.Module, batches: Iterable, loss: Callable = per_sample_loss) -> Iterator[Tensor]:
    """The gradients g_i one by one, in chunks (b, D): much slower than summing them. In eval mode."""
    losses = nn.Module()  # with the model in it: so functional_call replaces the weights of the loss's model
    losses.model, losses.forward = model, lambda *v: loss_of_each(model, [part[None] for part in v], loss)[0]
    theta = {f"model.{name}": p.detach() for name, p in named_weights(model).items()}
    gradient = vmap(grad(lambda theta, sample: functional_call(losses, theta, sample)), (None, 0))
    for i, batch in enumerate(parts_that_fit(model, batches)):
        # First, as functional_call does not leave a module that the model holds twice as it was.
        exact = first_gradients(model, batch, loss) if i == 0 else []
        with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels do not support vmap
            g = torch.cat([v.flatten(1) for v in gradient(theta, tuple(batch)).values()], 1)  # (b, D)
        refuse_infinite(g)
        compare_with_single_samples(exact, g)
        yield g


def parts_that_fit(model: nn.Module, batches: Iterable) -> Iterator[tuple]:
    """The batches in parts whose gradients take 1 GB in the making, or on a GPU a quarter of what is free."""
    device, weights = next(model.parameters()).device, sum(p.numel() for p in trainable(model))
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 10**9
    size = max(2, memory // (8 * weights))  # of one alone it would not be seen that a model mixes samples
    return (part for batch in batches for part in zip(*(v.split(size) for v in batch)))


# ---- Processes: torchrun starts several, on one machine or more, and each takes its share of a run's work.
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0  # the number of this process


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1  # how many there are


def my_share(items: Iterable, shared: bool = True) -> Iterator:
    """The items that this process computes: every world()-th, or all of them."""
    return islice(items, rank(), None, world()) if shared else iter(items)


def all_sum(v: Tensor, shared: bool = True) -> Tensor:
    """v summed over the processes, in place; of a single process v as it is."""
    if shared and world() > 1:
        dist.all_reduce(v)
    return v


def sample_images(cfg, model: nn.Module, noise: Tensor, y: Tensor, name: str, steps=None) -> Tensor:
    """DDIM images (N, C, H, W) uint8 of classes y (N,), the i-th from noise[i % M], of noise (M, C, H, W)."""
    images = torch.zeros(len(y), *noise.shape[1:], dtype=torch.uint8, device=y.device)
    size = math.ceil(min(SAMPLE_BATCH[cfg.device] / cfg.accumulate, len(y) / world()))
    model.eval()
    for i in my_share(progress(torch.arange(len(y), device=y.device).split(size), name, leave=False)):
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
            images[i] = to_uint8(ddim_sample(model, noise[i % len(noise)], y[i], steps or cfg.sample_steps))
    return all_sum(images)  # the other processes' images were 0 here


def gradient_function(cfg: Settings) -> Callable:
    """terms_and_gradient as a run computes it: in parts, each process its own, in bfloat16, recorded."""
    parts = world() * cfg.accumulate
    of_rows = partial(terms_and_gradient, dtype=torch.bfloat16 if cfg.bf16 else torch.float32)
    of_rows = Recorded(of_rows) if cfg.cuda_graph else of_rows

    def gradient_of(model, teacher, penalty, batch):
        terms = gradient = 0.0
        # Part i takes the rows i, i + parts, ..: each part is half real, half replayed, like the whole batch.
        for i in range(rank(), parts, world()):
            part = of_rows(model, teacher, penalty, [v[i::parts].contiguous() for v in batch])
            terms, gradient = terms + part[0] / parts, gradient + part[1] / parts
        return all_sum(terms), all_sum(gradient)

    return gradient_of


class Recorded:
    """function(model, teacher, penalty, rows) as a CUDA graph, for rows that keep their shapes.

    A GPU is done with a small kernel sooner than the CPU has started the next. So the thousands of a step are
    recorded at the first call, and from then on started at once. All else that the function reads, as the
    weights, must stay where it lies in memory; the next call overwrites the result.
    """

    def __init__(self, function: Callable):
        self.function, self.graph = function, None

    def __call__(self, model, teacher, penalty, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not self.graph:
            self.rows, self.graph = [v.clone() for v in rows], torch.cuda.CUDAGraph()
            now, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(now)
            with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(side):
                self.function(model, teacher, penalty, self.rows)  # a first call sets up what is not recorded
            now.wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.result = self.function(model, teacher, penalty, self.rows)
        for mine, given in zip(self.rows, rows):
            mine.copy_(given)
        self.graph.replay()
        return self.result


# ---- A run's state: all that it needs to go on, and what checkpoint.pt holds. No generator is in it: each
# epoch, each pool and each evaluation draws from a fresh one, seeded by what it is for.
@dataclass
class State:  # between two epochs
    model: UNet
    data: str = ""  # the digest of the images and labels
    optimizer: torch.optim.Optimizer | None = None
    teacher: UNet | None = None  # the frozen model of the last task, with replay
    penalty: Penalty | None = None
    average: Tensor | None = None  # (D,) of this task's weights, with --ema
    task: int = 0  # tasks done
    epoch: int = 0  # epochs done of the next one
    step: int = 0  # training steps done of it
    class_order: list = field(default_factory=list)  # the true class of each label
    fid: list = field(default_factory=list)  # a row per task done, a column per task; None: not yet learned
    fid_pooled: float | None = None  # joint: one FID of all classes
    fid_real: list = field(default_factory=list)  # of real training images, a number per task
    fisher: list = field(default_factory=list)  # of each task but the last: c*, ||mu||, ..
    drift: list = field(default_factory=list)  # after each task but the first
    seconds: dict = field(default_factory=dict)  # spent on each part
    log: list = field(default_factory=list)  # mean losses, a line per epoch
    saved_at: float = field(default_factory=time.monotonic)  # when the last checkpoint was; not in it


def new_state(cfg: Settings, data: Data, device: torch.device) -> State:
    torch.manual_seed(cfg.seed)  # the global generator gives the initial weights
    size, levels = data.x.shape[-1], len(cfg.channels)
    with or_stop("--channels do not fit", "choose others", ValueError):
        if size % 2 ** (levels - 1) or size == 2 ** (levels - 1):  # a group norm needs more than one pixel
            raise ValueError(f"{levels} levels, each of half the size, for {size}x{size} pixels")
        model = UNet(data.x.shape[1], int(data.y.max()) + 1, cfg.channels, cfg.layers_per_block, cfg.dropout)
    penalty = METHODS[cfg.method].penalty
    return State(model.to(device), digest(data), penalty=penalty(cfg.lam) if penalty else None)


def end_epoch(cfg: Settings, state: State, means: list[float], bar: tqdm) -> None:
    state.epoch += 1
    if not (all(map(math.isfinite, means)) and flat(trainable(state.model)).isfinite().all()):
        where = f"task {state.task + 1} in epoch {state.epoch}"
        raise FloatingPointError(f"the loss or a weight is not finite in {where}")
    terms = dict(zip(("denoise", "distill", "ewc"), means))
    state.log.append({"task": state.task + 1, "epoch": state.epoch, "step": state.step} | terms)
    bar.set_postfix({name: f"{v:.4f}" for name, v in terms.items() if v}, refresh=False)
    if time.monotonic() - state.saved_at > CHECKPOINT_SECONDS:
        save_checkpoint(cfg, state)


def steps_of(cfg: Settings, task: Data) -> tuple[int, int]:
    """The real images per step, and the steps of a task."""
    n, parts = len(task.y), world() * cfg.accumulate
    size = min(cfg.batch_size, n)
    if size % parts:
        task_of = f"the {n} images of the task of classes {int(task.y.min())} to {int(task.y.max())}"
        must = f"must be a multiple of {parts} (processes x --accumulate), and at most {task_of}"
        stop(f"--batch-size {cfg.batch_size} {must}")
    return size, cfg.epochs * (n // size)


def settings_of(cfg: Settings) -> dict:
    return {name: value for name, value in vars(cfg).items() if name not in MAY_CHANGE}


def refuse_other(settings: dict, script: str | None, cfg: Settings, path: Path) -> None:
    """Stop if `path` is of a run with other settings; say so if it is of another version of this script."""
    old = {name: row[0] for name, row in SETTINGS.items()} | RETIRED | settings
    new = RETIRED | vars(cfg)
    for name in old:
        if name not in MAY_CHANGE and old[name] != new.get(name):
            made = f"{path} was made with --{name.replace('_', '-')} {old[name]}, not {new.get(name)}"
            stop(f"{made}: --fresh starts over, --out names another folder")
    if script != SCRIPT:
        tqdm.write(f"note: {path} was made by another version of this script (--fresh starts over)")


def save_checkpoint(cfg: Settings, state: State) -> None:
    """The state goes to checkpoint.pt, and its log, for people, to log.jsonl. Rank 0 alone writes."""
    saved = vars(state) | {"settings": settings_of(cfg), "script": SCRIPT}
    del saved["saved_at"]
    saved = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in saved.items()}
    if rank() == 0:
        with whole(cfg.out / "checkpoint.pt") as file:
            torch.save(saved, file)
        with whole(cfg.out / "log.jsonl") as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in state.log)
    state.saved_at = time.monotonic()


def load_checkpoint(cfg: Settings, state: State) -> None:
    """The state becomes that of checkpoint.pt, if there is one. With --fresh the old run is deleted."""
    path, device = cfg.out / "checkpoint.pt", next(state.model.parameters()).device
    for name in ("result.json", "checkpoint.pt", "model.pt", "log.jsonl", "samples-task*.png"):
        for old in cfg.out.glob(name) if cfg.fresh and rank() == 0 else ():
            old.unlink()
    if (cfg.out / "model.pt").exists() and not path.exists() and not cfg.fresh:
        stop(f"{cfg.out / 'model.pt'} is not of a run of this script: name another folder with --out")
    if path.exists() and not cfg.fresh:
        with or_stop(f"{path} is damaged, or of another version of this script", "remove it or give --fresh"):
            saved = load_whole(path, device)
            refuse_other(saved.pop("settings"), saved.pop("script"), cfg, path)
            if not 0 <= saved["task"] == len(saved["fid"]) <= cfg.tasks or saved.keys() - vars(state).keys():
                raise ValueError("its parts do not belong together")
            if saved["data"] != state.data:
                stop(f"{path} is of other images or labels: --fresh starts over, --out names another folder")
            state.task = saved["task"]
            begin_task(cfg, state)  # makes the optimizer and the teacher, which are then filled
            for name in ("model", "optimizer", "teacher", "penalty"):
                if content := saved.pop(name):
                    getattr(state, name).load_state_dict(content)
            vars(state).update(saved)
        tqdm.write(f"going on from {path}: {state.task} of {cfg.tasks} tasks and {state.epoch} epochs done")
    position = torch.tensor([state.task, state.epoch])
    if not torch.equal(all_sum(position.clone()), position * world()):
        stop("the processes do not see the same files: --out must be a folder that all of them see")


@contextmanager
def timed(state: State, part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    state.seconds[part] = state.seconds.get(part, 0.0) + time.perf_counter() - started


# ---- What a run shows: a bar, a table, pictures, result.json.
def progress(items: Iterable | None = None, name: str | None = None, **options) -> tqdm:
    """A progress bar: shown by one process alone, and rarely redrawn where stderr is a file."""
    seldom = 0.5 if sys.stderr and sys.stderr.isatty() else 10
    return tqdm(items, name, mininterval=seldom, dynamic_ncols=True, disable=QUIET or rank() > 0, **options)


def write_json(path: Path, content: dict) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    with whole(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_result(path: Path) -> dict:
    if not path.exists():
        stop(f"{path.parent} holds no finished run (result.json): name another, or train it with --out")
    with or_stop(f"{path} is damaged", "remove it, or start its run over with --fresh"):
        result = json.loads(path.read_text(), parse_constant=int)  # int("NaN") is an error, as it should be
        result["config"], table(result)  # fails if anything of this is missing
    return result


def table(result: dict) -> str:
    """The FID of each task after each task, with AFID at the right, from the content of a result.json."""
    number = lambda v: "" if v is None else f"{v:.1f}"
    tasks = [f"task {k + 1}" for k in range(len(result["fid_real"]))]
    rows = [["after task", *tasks, "AFID"]]
    for fids, afid in zip(result["fid"], result["afid"]):
        rows.append([len(tasks) - fids.count(None), *map(number, [*fids, afid])])
    rows.append(["real images", *map(number, result["fid_real"]), "   (training, not test)"])
    energies = [result["lam"] * fisher["energy"] for fisher in result["fisher"] if "energy" in fisher]
    if energies:
        note = "   (lambda c* ||mu||^2, what the penalty adds along mu)"
        rows.append(["curvature", *map("{:.3g}".format, energies), note])
    lines = [f"{name:<12}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]
    title = f"{result['dataset']}, {result['method']}: FID of each task (features: {result['fid_features']})"
    forgetting = "-" if result["forgetting"] is None else f"{result['forgetting']:.2f}"
    end = f"AFID {result['afid'][-1]:.2f}   forgetting {forgetting}   (lower is better)"
    return "\n".join(["", title, *lines, "", end, ""])


def show_progress(cfg: Settings, state: State, seen: list[Data], device: torch.device) -> None:
    """After a task: print its row of FIDs and write samples-task<k>.png, a class per row."""
    from torchvision.utils import save_image

    row = [f"{fid:.1f}" for fid in state.fid[-1] if fid is not None]
    tqdm.write(f"after task {len(row)}, FID ({cfg.fid_features}): {'  '.join(row)}")
    # Of two classes of each task ten samples each, from the same noises.
    y = torch.cat([task.test_y.unique()[:2] for task in seen]).to(device).repeat_interleave(10)
    noise = torch.randn(10, *seen[0].x.shape[1:], generator=rng(device, cfg.seed, "picture"), device=device)
    images = sample_images(cfg, state.model, noise, y, "pictures").cpu() / 255
    images = functional.interpolate(images, scale_factor=max(1, 32 // images.shape[-1]))  # 32x32 pixels each
    if rank() == 0:
        with whole(cfg.out / f"samples-task{len(seen)}.png") as file:
            save_image(images, file, format="png", nrow=10, pad_value=0.5)


def finish(cfg: Settings, state: State) -> dict:
    """After the last task: write model.pt and result.json. -> what result.json holds."""
    result = {name: getattr(cfg, name) for name in ("dataset", "method", "lam", "seed", "fid_features")}
    result |= {
        name: getattr(state, name) for name in ("fid", "fid_pooled", "fid_real", "fisher", "drift", "data")
    } | {"class_order": state.class_order}
    result["afid"], result["forgetting"] = afid_and_forgetting(state.fid)
    packages = ("torch", "torchvision", "clean-fid", "scipy", "numpy", "scikit-learn")
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    seconds = {part: round(v, 1) for part, v in state.seconds.items()}
    result |= {"config": settings_of(cfg), "script": SCRIPT, "processes": world()}
    result |= {"cuda_graph": cfg.cuda_graph, "versions": versions, "seconds": seconds}
    if rank() == 0:
        with whole(cfg.out / "model.pt") as file:
            torch.save(state.model.state_dict(), file)
        write_json(cfg.out / "result.json", result)
    return result


# ---- Command line.
def parse_args(argv: list[str] | None = None) -> Settings:
    """The paper's settings; over them the dataset's row, then --small and --limit, then the command line."""
    epilog = "(..): the paper's value, or else the default. The digits, --small and --limit have others."
    summary = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, epilog=epilog, allow_abbrev=False)
    parser.error = stop
    for name, (value, kind, limits, text) in SETTINGS.items():
        options = {"type": kind, "choices": limits if kind is str else None}
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else options
        text = text if value is None or value is False else f"{text} ({value})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    settings = {name: row[0] for name, row in SETTINGS.items()}
    dataset = given.get("dataset", settings["dataset"])
    settings |= DATASETS[dataset]
    for name, value in (settings | given).items():
        if name not in SETTINGS:
            stop(f"DATASETS[{dataset!r}]: no setting is called {name}")
        _, kind, limits, _ = SETTINGS[name]
        values = value if kind is numbers else [value] if kind in (int, float) and value is not None else []
        if not all(type(v) in (int, kind) and limits[0] <= v <= limits[1] for v in values):
            stop(f"--{name.replace('_', '-')} must be from {limits[0]:g} to {limits[1]:g}, not {value!r}")
        if kind is str and limits and value not in limits:
            stop(f"--{name.replace('_', '-')} must be one of {', '.join(limits)}, not {value!r}")
    small = given.get("small") and settings["channels"] != DIGITS["channels"]  # digits are small
    settings |= SMALL if small else {}
    if "limit" in given:
        settings["replay_per_class"] = min(given["limit"], settings["replay_per_class"])
        settings["fisher_samples"] = min(2 * given["limit"], settings["fisher_samples"])  # of two classes
    cfg = Settings(**settings | given)
    of = METHODS[cfg.method]
    if (of.distill and not of.replay) or bool(of.fisher) != bool(of.penalty):
        stop(f"METHODS[{cfg.method!r}]: distillation needs replay, and a Fisher its penalty")
    cfg.lam = cfg.lam if METHODS[cfg.method].penalty else 0.0
    cfg.out = cfg.out or Path("runs-small" if small else "runs", cfg.dataset, f"{cfg.method}+seed={cfg.seed}")
    return cfg


def set_up(cfg: Settings) -> torch.device:
    """Start the processes and find the device, each process its own; settle what depends on it."""
    # cuBLAS reads this when CUDA starts: without it the same seed may give two results on one GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    local = os.environ.get("LOCAL_RANK") if dist.is_torchelastic_launched() else None  # set by torchrun alone
    if local and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=timedelta(days=1))  # gloo on CPUs, NCCL on GPUs
    sys.stdout = sys.stdout if rank() == 0 else io.StringIO()  # rank 0 speaks for all
    name = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    with or_stop(f"no --device {cfg.device} for process {rank()}", "choose auto, cpu, cuda, cuda:1 or mps"):
        device = torch.zeros(1, device=f"cuda:{local or 0}" if name == "cuda" else name).device
        if device.type not in ("cpu", "cuda", "mps") or (world() > 1 and name[-1].isdigit()):
            raise ValueError("another kind, or one device for several processes")
    cfg.device, on_gpu = device.type, device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    elif device.type == "cpu" and sum(cfg.channels) < 100:
        # Two threads are faster on idle cores, but much slower where one is busy: `make bench` measures both.
        torch.set_num_threads(1)
    if cfg.bf16 is None:
        cfg.bf16 = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    cfg.cuda_graph = on_gpu and cfg.cuda_graph is not False
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: mu is a mean that all but cancels
    return device


def begin_run(cfg: Settings, device: torch.device) -> dict:
    """Load the data and the features of the FID, then run."""
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for i in range(3):  # one process may have to download, then one of each other machine, then all
        if i == turn:
            data = load_data(cfg.dataset, cfg.data_dir)
            features = fid_features(cfg, data, device)
        all_sum(torch.zeros(1))  # all wait here
    if cfg.limit:
        data, cfg.fid_features = limit_classes(data, cfg.limit), f"{cfg.fid_features}, limit {cfg.limit}"
    if device.type == "cpu" and sum(cfg.channels) > 256:
        print("note: this network takes months on a CPU; for a quick look in minutes: --small --limit 50")
    return run(cfg, data, features, device)


def main(argv: list[str] | None = None) -> dict:
    """Check everything that can be checked, then run, or go on with a run that was stopped."""
    import filelock

    cfg = parse_args(argv)
    finished = cfg.out / "result.json"
    try:
        device = set_up(cfg)
        if finished.exists() and not cfg.fresh:
            result = read_result(finished)
            refuse_other(result["config"], result.get("script"), cfg, finished)
            told = f"{finished} holds a finished run; no images were read (--fresh starts it over)"
        else:
            # The only run that writes into --out: the kernel drops the lock if its holder dies.
            with filelock.FileLock(cfg.out / ".lock", blocking=False) if rank() == 0 else nullcontext():
                for left in cfg.out.glob(".rank1_ewc-*") if rank() == 0 else ():  # by a run that was killed
                    left.unlink()
                result = begin_run(cfg, device)
            told = f"In {cfg.out}: result.json, samples-task<k>.png, log.jsonl, model.pt"
    except KeyboardInterrupt as interrupt:
        if rank() == 0:
            same = f"the same command{', without --fresh,' if cfg.fresh else ''}"
            print(f"\nrank1_ewc: interrupted; {same} goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(128 + (*interrupt.args, signal.SIGINT)[0]) from None
    except FisherError as error:
        stop(f"{error}: choose another --method")
    except FloatingPointError as error:
        stop(f"{error}: lower --lr (now {cfg.lr:g}) or --lam (now {cfg.lam:g})")
    except filelock.Timeout:
        stop(f"another run writes into {cfg.out}: wait for it, or name another folder with --out")
    except OSError as error:
        place = error.filename2 or error.filename or f"{cfg.out}, or the output,"
        stop(f"{place} cannot be read or written ({error.strerror or error})")
    except torch.OutOfMemoryError:
        stop(f"{cfg.device} has too little memory: raise --accumulate ({cfg.accumulate}) or lower --channels")
    print(f"{table(result)}\n{told}")
    return result


def program() -> None:
    """main() as a program of its own, which may settle what belongs to the whole process."""

    def terminate(number, _):  # SIGTERM, a cluster's warning, acts as Ctrl-C does, with its own status
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    # stdout or stderr may be closed, or take ASCII alone: then text is lost, but the run goes on.
    sys.stdout, sys.stderr = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    main()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    program()
