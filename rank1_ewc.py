"""Class-incremental learning of a diffusion model with generative distillation and rank-1 EWC.

"Avoid Catastrophic Forgetting with Rank-1 Fisher from Diffusion Models", Wang, Gupta, Dong,
MacLellan, ICLR 2026, arXiv 2509.23593. Part I is the paper's method and can be read on its own.
Part II has the network, data and FID; Part III has settings, checkpoints and the command line.

    python rank1_ewc.py --epochs 90                             # 8x8 digits: minutes on a laptop
    python rank1_ewc.py --dataset mnist --method rank1          # the paper's run: hours on a GPU
    torchrun --nproc_per_node 8 rank1_ewc.py --dataset mnist    # on 8 GPUs; --help lists all flags

Where to find the paper's equations:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          add_noise
    the denoising loss of one sample, l                    per_sample_loss
    DDIM, from noise to an image                           ddim_sample
    replay: the teacher's samples of old classes           replay_pool
    L_T and L_GD                                           losses
    Propositions 1 and 2, Theorem 1: F ~ c* mu mu^T        rank1_fisher
    F_jj = E[g_j^2]                                        diagonal_fisher
    (lam/2) sum_k c*_k (mu_k^T (theta - theta*_k))^2       Rank1Penalty
    (lam/2) sum_kj F_k,jj (theta_j - theta*_k,j)^2         DiagonalPenalty
    the rows of Table 1                                    METHODS
    L = L_T + L_GD + L_EWC                                 objective
    AFID and forgetting                                    afid_and_forgetting
    a new teacher and a new Adam for each task             begin_task, run

Symbols: x0 a clean image in [-1, 1], (B, C, H, W); t a timestep in 0..999, (B,); y a class, (B,);
eps Gaussian noise of x0's shape; abar_t how much of x0 is left in x_t; theta all D trainable
weights as one vector, (D,); theta* the weights at the end of a task; g = dl/dtheta the gradient of
one sample's loss, (D,); mu = E[g]; F = E[g g^T] the Fisher; c* the coefficient in F ~ c* mu mu^T;
lam EWC's lambda; k an old task.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
import zipfile
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
from torch.nn.utils import vector_to_parameters
from tqdm import tqdm

# ==================================================================================================
# PART I: THE PAPER
# ==================================================================================================

# ---- Helpers for the mathematics below: weights as one vector, images as floats, random numbers,
# and the division of work among torchrun's processes.


def trainable(model: nn.Module) -> list[Tensor]:
    """The weights that are not frozen, in the order of model.parameters()."""
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors concatenated into one vector: flat(trainable(model)) is theta, (D,)."""
    return torch.cat([v.reshape(-1) for v in tensors])


def dot(a: Tensor, b: Tensor) -> float:
    """a^T b in float64: summed over 37 million weights, float32 would lose digits."""
    return float(a.cpu().double() @ b.cpu().double())


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]; floats in [-1, 1] stay as they are.

    ValueError: anything else, including floats with none below 0, which are probably in 0..1.
    """
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    low = images.min().item()
    high = images.max().item()
    if not (images.is_floating_point() and -1 <= low < 0 and high <= 1):
        found = f"{images.dtype} from {low:g} to {high:g}"
        raise ValueError(f"images must be uint8, or floats in -1..1 with some below 0, not {found}")
    return images


def rng(device: torch.device, *purpose: int | str) -> torch.Generator:
    """A separate generator per purpose, so that one more draw in one place changes no other."""
    digest = hashlib.sha256(" ".join(map(str, purpose)).encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1  # 63 bits: epoch_batches adds the rank
    return torch.Generator(device).manual_seed(seed)


def rank() -> int:
    """The number of this process, 0..world()-1 (torch's word, not a matrix's rank)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share(items: Iterable) -> Iterator:
    """The items that this process computes: every world()-th."""
    return islice(items, rank(), None, world())


def all_sum(v: Tensor) -> Tensor:
    """Sum v over all processes, in place."""
    if world() > 1:
        dist.all_reduce(v)
    return v


# ---- Diffusion (DDPM, arXiv 2006.11239): noise is mixed into an image, and the network learns to
# predict it. An image is generated from pure noise by removing the predicted noise step by step.

NUM_STEPS = 1000  # timesteps


@cache
def alphas_cumprod(device: torch.device) -> Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), with beta linear from 1e-4 to 0.02. (1000,) float32."""
    beta = torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float32, device="cpu")
    return torch.cumprod(1 - beta, 0).to(device)


def add_noise(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. x0, eps (B, ..), t (B,) -> (B, ..).

    ValueError: x0 is not float, for example still uint8.
    """
    if not x0.is_floating_point():
        raise ValueError(f"x0 must be floats in -1..1, not {x0.dtype}: use to_float(images)")
    each = [-1] + [1] * (x0.ndim - 1)  # to broadcast abar_t over samples of any shape
    abar = alphas_cumprod(x0.device)[t].view(each)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def draw_noise(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t ~ U{0..999} (B,) and eps ~ N(0, 1) of x0's shape."""
    t = torch.randint(NUM_STEPS, (len(x0),), generator=generator, device=x0.device)
    eps = torch.randn(x0.shape, generator=generator, device=x0.device)
    return t, eps


def predict_noise(model: Callable, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """eps_theta(x_t, t, y), in x_t's shape. ValueError: another shape, which may broadcast."""
    eps = model(x_t.clone(), t, y)  # a copy, because a model may change its input in place
    if eps.shape != x_t.shape:
        shapes = f"{tuple(x_t.shape)}, not {tuple(eps.shape)}"
        raise ValueError(f"the model must return eps in the shape of x_t, {shapes}")
    return eps


def per_sample_loss(model: Callable, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor) -> Tensor:
    """l_i = mean over pixels of (eps_theta(x_t, t, y) - eps)^2. -> (B,)."""
    x_t = add_noise(x0, t, eps)
    error = predict_noise(model, x_t, t, y) - eps
    return error.square().flatten(1).mean(1)


@torch.no_grad()
def ddim_sample(model: Callable, noise: Tensor, y: Tensor, steps: int = 50) -> Tensor:
    """DDIM (arXiv 2010.02502) with eta 0: noise (B, C, H, W), y (B,) -> x0 (B, C, H, W) in [-1, 1].

    steps: 1..1000; 50 are the timesteps 980, 960, .., 0. As in diffusers' DDIMScheduler, the
    estimate of x0 is clipped to [-1, 1] and eps is not; the last step ends without noise.
    """
    abar = alphas_cumprod(noise.device)
    stride = NUM_STEPS // steps
    x = noise
    for t in range((steps - 1) * stride, -1, -stride):
        same_t = torch.full((len(y),), t, device=y.device)
        eps = predict_noise(model, x, same_t, y).float()  # it is bfloat16 with --bf16
        x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        abar_next = abar[t - stride] if t > 0 else torch.ones_like(abar[0])
        x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps
    return x


# ---- Generative distillation (arXiv 2311.14028): the teacher, a frozen copy of the model after the
# previous task, generates images of all old classes. On these the student imitates the teacher.


def replay_pool(cfg, teacher: nn.Module, shape: tuple, num_old: int) -> tuple[Tensor, Tensor]:
    """Equally many teacher samples of each class 0..num_old-1. -> (N, C, H, W) uint8, y (N,)."""
    device = next(teacher.parameters()).device
    # All classes share one set of starting noises, the same after every task, as in the authors'
    # code: image i starts from noise[i % replay_per_class].
    generator = rng(device, cfg.seed, "replay pool")
    noise = torch.randn(cfg.replay_per_class, *shape, generator=generator, device=device)
    y = torch.arange(num_old, device=device).repeat_interleave(cfg.replay_per_class)
    steps = cfg.replay_steps or cfg.sample_steps
    return sample_images(cfg, teacher, noise, y, steps, "replay pool"), y


def losses(
    model: Callable, teacher: Callable | None, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """L_T, the denoising loss of real rows, and L_GD, the distance to the teacher on replayed ones.

    x0, eps (B, C, H, W), t, y (B,). With a teacher, the first half of the rows is real, the second
    replayed. Without one, all rows are denoised, even replayed ones, and L_GD is 0. As in the
    authors' code, the student runs once. ValueError: an odd number of rows with a teacher.
    """
    x_t = add_noise(x0, t, eps)
    eps_model = predict_noise(model, x_t, t, y)
    if teacher is None:
        return functional.mse_loss(eps_model, eps), eps.new_zeros(())
    if len(y) % 2:
        raise ValueError(f"half of the rows must be real and half replayed, but there are {len(y)}")
    half = len(y) // 2
    with torch.no_grad():
        eps_teacher = predict_noise(teacher, x_t[half:], t[half:], y[half:])
    denoise = functional.mse_loss(eps_model[:half], eps[:half])
    distill = functional.mse_loss(eps_model[half:], eps_teacher)
    return denoise, distill


# ---- Fisher: F = E[g g^T], computed after a task on its real images, tells which directions in
# weight space matter to that task. F has D x D entries, so something smaller approximates it.
#
# The contract of every Fisher, including one that you write (results/beyond.py has examples):
#   fisher(model, x, y, n, generator, loss=per_sample_loss) -> what its penalty's add() takes
# F is that of the trainable weights, in eval mode. x: images (N, C, H, W), uint8 or in [-1, 1]; y:
# classes (N,); n: the number of samples (image, t, eps); generator: on the images' device.
# loss(model, x0, t, eps, y) -> (B,), one per sample. uint8 images become floats in [-1, 1] first;
# floats are passed on unchanged, and may have any range if the loss is yours. The processes divide
# the work, so each must call the Fisher, with the network itself and not with its
# DistributedDataParallel wrapper. ValueError: a model or images for which F would be wrong.
# FloatingPointError: a gradient is not finite, or all are 0.

FISHER_BATCH = 128  # samples computed together
GRADIENT_FLOATS = 400_000_000  # at most this many numbers in per-sample gradients at once: 1.6 GB


def fisher_batches(
    x: Tensor,
    y: Tensor,
    n: int,
    generator: torch.Generator,
    loss: Callable = per_sample_loss,
    size: int = FISHER_BATCH,
) -> Iterator[tuple]:
    """Batches of n samples (x0, t, eps, y): all images in random order before any is repeated."""
    if not len(x) == len(y) > 0:
        raise ValueError(f"each image needs its class: {len(x)} images, {len(y)} classes")
    if loss is per_sample_loss and x.dtype != torch.uint8:
        to_float(x)  # only checks the range; another loss may take latents
    rounds = math.ceil(n / len(x))
    orders = [torch.randperm(len(x), generator=generator, device=x.device) for _ in range(rounds)]
    for index in torch.cat(orders)[:n].split(size):
        x0 = x[index]
        if x0.dtype == torch.uint8:
            x0 = to_float(x0)
        t, eps = draw_noise(x0, generator)
        yield x0, t, eps, y[index]


def zeros_for_sum(weights: list[Tensor]) -> Tensor:
    """Zeros (D,), at least float32: in bfloat16 a long sum would stop growing."""
    zeros = torch.zeros_like(flat(weights))
    return zeros.to(torch.promote_types(zeros.dtype, torch.float32))


# Why rank 1? At high noise x_t is nearly all noise, and the best denoiser is a scaled identity
# (Proposition 1). If eps_hat = a(theta) x_t, then, up to a constant, g is (a x_t - eps)^T x_t times
# da/dtheta: a number c(x_t) times a vector v that all samples share (Proposition 2). So
# g g^T = c^2 v v^T, and F has rank 1. As mu is a multiple of v, too, F ~ c* mu mu^T with
# c* = mu^T F mu / ||mu||^4 and mu^T F mu = E[(mu^T g)^2] (Theorem 1). The paper finds that the mu
# of different t are nearly parallel, and takes one mu over random t. But F over all t is further
# from rank 1 than F at high noise, and near a minimum mu is short and partly noise
# (results/pages/fisher.md).
def rank1_fisher(
    model: nn.Module, x: Tensor, y: Tensor, n: int, generator: torch.Generator, loss=per_sample_loss
) -> tuple[Tensor, Tensor]:
    """Theorem 1: mu = E[g] (D,) over n draws, c* = E[(mu^T g)^2] / ||mu||^4 () over n others.

    Over the draws that gave mu, c* would be too large: mu^T g_i would contain ||g_i||^2 / n.
    """
    weights = trainable(model)
    total = zeros_for_sum(weights)  # sum of all g_i
    squares = total.new_zeros(())  # sum of all (u^T g_i)^2, with u = mu / ||mu||
    # MATH: the other attention kernels have no second derivative.
    with eval_mode(model), sdpa_kernel(SDPBackend.MATH):
        for batch in my_share(fisher_batches(x, y, n, generator, loss)):
            l = loss(model, *batch)  # (B,)
            # materialize_grads: a weight that the loss does not use gets gradient 0, not None.
            total += flat(torch.autograd.grad(l.sum(), weights, materialize_grads=True))
        mu = all_sum(total) / n
        mu_norm = math.sqrt(dot(mu, mu))
        u = mu / mu_norm

        # A batch's u^T g_i without per-sample gradients: with a weight w_i on each loss, a backward
        # pass gives G = sum_i w_i g_i, and the derivative of u^T G with respect to w_i is u^T g_i.
        for i, batch in enumerate(my_share(fisher_batches(x, y, n, generator, loss))):
            l = loss(model, *batch)
            w = torch.ones_like(l, requires_grad=True)
            G = torch.autograd.grad(l, weights, w, create_graph=True, materialize_grads=True)
            (u_g,) = torch.autograd.grad(u @ flat(G).to(u.dtype), w)  # (B,)
            squares += u_g.to(u.dtype).square().sum()
            if i == 0:
                check_first_sample(model, batch, loss, u_g[0], u)
        c_star = all_sum(squares) / n / mu_norm**2  # as (mu^T g)^2 = ||mu||^2 (u^T g)^2
    if not c_star.isfinite():
        raise FloatingPointError(f"||mu|| is {mu_norm:g}: a gradient is not finite, or all are 0")
    return mu, c_star


def per_sample_gradients(
    model: nn.Module, batch: tuple, loss: Callable = per_sample_loss
) -> Tensor:
    """g_i of each sample of a batch (x0, t, eps, y), in the model's current mode. -> (B, D)."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of_one(weights, x0, t, eps, y):
        def predict(*inputs):
            # tie_weights=True would leave plain tensors in a module that the model holds twice.
            return functional_call(model, weights, inputs, tie_weights=False)

        return loss(predict, x0[None], t[None], eps[None], y[None])[0]

    with sdpa_kernel(SDPBackend.MATH):  # vmap cannot batch the other attention kernels
        g = vmap(grad(loss_of_one), (None, 0, 0, 0, 0))(weights, *batch)
    return torch.cat([v.reshape(len(v), -1) for v in g.values()], 1)


def diagonal_fisher(
    model: nn.Module, x: Tensor, y: Tensor, n: int, generator: torch.Generator, loss=per_sample_loss
) -> Tensor:
    """F_jj = E[g_j^2] (D,) over n draws (EWC, arXiv 1612.00796), from per-sample gradients."""
    total = zeros_for_sum(trainable(model))
    # 128 gradients of 37 million weights would take 19 GB.
    size = max(1, min(FISHER_BATCH, GRADIENT_FLOATS // len(total)))
    with eval_mode(model):
        for i, batch in enumerate(my_share(fisher_batches(x, y, n, generator, loss, size))):
            g = per_sample_gradients(model, batch, loss)
            if i == 0:
                check_first_sample(model, batch, loss, g[0])
            total += g.to(total.dtype).square_().sum(0)
    F = all_sum(total) / n
    if not 0 < F.sum() < math.inf:
        raise FloatingPointError(f"tr(F) is {F.sum():g}: a gradient is not finite, or all are 0")
    return F


# What both Fishers use: eval mode, and a check that the model treats each sample by itself.


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, then as before. Not by eval(), which may merge a LoRA layer."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = False
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def generator_states(device: torch.device) -> Tensor:
    """The states of PyTorch's global generators: the CPU's, and the GPU's if `device` is one."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def check_first_sample(
    model: nn.Module, batch: tuple, loss: Callable, found: Tensor, u: Tensor | None = None
) -> None:
    """ValueError unless the batch gave its first sample what that sample gives alone.

    found: that sample's g (D,) as computed in the batch or, with a unit vector u (D,), its u^T g.
    """

    def gradient(samples: Iterable[Tensor]) -> Tensor:  # of the first one's loss
        first = loss(model, *samples)[0]
        return flat(torch.autograd.grad(first, trainable(model), materialize_grads=True))

    before = generator_states(batch[0].device)
    g = gradient([v[:1] for v in batch])
    in_batch = gradient(batch)
    exact = g if u is None else u @ g.to(u.dtype)
    error = max((in_batch - g).norm(), (found - exact).norm())
    rounding = 0.02 + 10 * torch.finfo(g.dtype).eps  # 2% of ||g||, in bfloat16 10%
    drew = not torch.equal(before, generator_states(batch[0].device))
    if drew or error > rounding * g.norm():
        why = "mixes samples (by a batch norm?), draws at random, or uses another module's weights"
        raise ValueError(f"a sample's gradient differs when it is computed alone: the model {why}")


# ---- Penalties make it expensive to move the weights in directions that matter to any old task.
#
# The contract of every penalty, including one that you write. theta is flat(trainable(model)),
# (D,), in the order of model.parameters(), which must stay the same:
#   Penalty(lam)           lam: EWC's lambda, the weight of the penalty
#   add(fisher, theta)     called after a task; copies what it keeps -> numbers for result.json
#   penalty(theta)         the scalar L_EWC, 0 before the first add
#   drift(theta)           a vector for result.json: how far theta is from the theta*_k
#   after_step(model, lr)  optional: called after each step of the optimizer
# A checkpoint stores vars(penalty). ValueError: lam or c* is negative or not finite; the Fisher is
# not finite, or not of theta's size.


def check_nonnegative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, not {value}")
    return value


def check_fisher(v: Tensor, theta: Tensor) -> None:
    if v.shape != theta.shape or not v.isfinite().all():
        what = f"{v.numel()} numbers for {theta.numel()} weights, or is not finite"
        raise ValueError(f"the Fisher has {what}: theta is flat(trainable(model))")


class Rank1Penalty:
    """(lam/2) sum_k c*_k (mu_k^T (theta - theta*_k))^2, the paper's rank-1 EWC.

    It keeps mu_k, c*_k and offset_k of each old task, but only the newest theta*, as the origin:

        mu_k^T (theta - theta*_k) = mu_k^T (theta - origin) + offset_k
        offset_k = mu_k^T (origin - theta*_k)

    Keeping every theta*_k would take another vector per task. Keeping the number mu_k^T theta*_k
    instead would lose float32's digits in mu_k^T theta - mu_k^T theta*_k: both are far larger than
    their difference.
    """

    def __init__(self, lam: float):
        self.lam = check_nonnegative("lambda", lam)
        self.mu = []  # (k, D)
        self.c_star = []  # (k,)
        self.offset = []  # (k,)
        self.origin = None  # (D,)

    @torch.no_grad()
    def add(self, fisher: tuple[Tensor, Tensor], theta: Tensor) -> dict[str, float]:
        mu, c_star = fisher
        check_fisher(mu, theta)
        check_nonnegative("c*", c_star)
        if self.origin is not None:
            moved = theta - self.origin
            self.offset = [float(o) + dot(m, moved) for o, m in zip(self.offset, self.mu)]
        self.origin = theta.detach().clone()
        self.mu = torch.stack([*self.mu, mu])
        self.c_star = mu.new_tensor([*self.c_star, c_star])
        self.offset = mu.new_tensor([*self.offset, 0.0])
        mu_norm = math.sqrt(dot(mu, mu))
        energy = float(c_star) * mu_norm**2  # mu^T F mu / ||mu||^2
        return {"c_star": float(c_star), "mu_norm": mu_norm, "energy": energy}

    def drift(self, theta: Tensor) -> Tensor:
        """mu_k^T (theta - theta*_k): ||mu_k|| times the distance moved along mu_k. -> (k,)."""
        with torch.autocast(theta.device.type, enabled=False):  # bfloat16 has only three digits
            return self.mu @ (theta - self.origin).to(self.mu.dtype) + self.offset

    def __call__(self, theta: Tensor) -> Tensor:
        if self.origin is None:
            return theta.new_zeros(())
        return self.lam / 2 * (self.c_star * self.drift(theta).square()).sum()


class DiagonalPenalty:
    """(lam/2) sum_k sum_j F_k,jj (theta_j - theta*_k,j)^2, EWC (arXiv 1612.00796).

    Completing the square makes one quadratic of all tasks (for one weight, with H = sum_k F_k):

        sum_k F_k (theta - theta*_k)^2 = H (theta - center)^2 + constant

    A new task moves center by share = F_k / H of the way to its theta*_k, and adds
    (H - F_k) share (theta*_k - center)^2 to the constant.
    """

    def __init__(self, lam: float):
        self.lam = check_nonnegative("lambda", lam)
        self.H = 0.0  # (D,) after the first task
        self.center = 0.0  # (D,)
        self.constant = 0.0

    @torch.no_grad()
    def add(self, fisher: Tensor, theta: Tensor) -> dict[str, float]:
        check_fisher(fisher, theta)
        H = self.H + fisher
        share = torch.where(H > 0, fisher / H, 0.0)  # the new theta*'s weight in center
        moved = theta - self.center
        self.constant += dot(self.H * share, moved.square())
        self.center = self.center + share * moved
        self.H = H
        return {"trace": float(fisher.sum())}

    def squares(self, theta: Tensor) -> Tensor:
        """sum_k sum_j F_k,jj (theta_j - theta*_k,j)^2, a scalar."""
        return (self.H * (theta - self.center).square()).sum() + self.constant

    def drift(self, theta: Tensor) -> Tensor:
        """The square root of squares(theta): one number for all old tasks. -> (1,)."""
        return self.squares(theta).sqrt()[None]

    def __call__(self, theta: Tensor) -> Tensor:
        return self.lam / 2 * self.squares(theta)


# ---- Methods: the rows of Table 1, and two baselines. results/beyond.py adds more.


class Method(NamedTuple):
    """What protects the old classes: replay, distillation on it, a penalty with a Fisher."""

    replay: bool = False
    distill: bool = False  # needs replay
    fisher: Callable | None = None  # computed after each task, for the penalty
    penalty: type | None = None
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


# ---- Training: the objective, one step, the epochs of a task, and all tasks.


def objective(model: nn.Module, teacher: nn.Module | None, penalty, batch: tuple) -> tuple:
    """The terms of L = L_T + L_GD + L_EWC, three scalars. The batch's rows are as in losses()."""
    denoise, distill = losses(model, teacher, *batch)
    ewc = penalty(flat(trainable(model))) if penalty else torch.zeros_like(denoise)
    return denoise, distill, ewc


def train_step(model, teacher, penalty, optimizer, batch: tuple, bf16: bool = False) -> Tensor:
    """One optimizer step on the objective. -> its three terms before the step, (3,).

    Each process computes an equal share of the real and of the replayed rows, so the number of
    processes must divide both.
    """
    rows = [v[rank() :: world()] for v in batch]
    with torch.autocast(rows[0].device.type, torch.bfloat16, enabled=bf16):
        terms = torch.stack(objective(model, teacher, penalty, rows))
    optimizer.zero_grad()
    terms.sum().backward()
    if world() > 1:
        for p in trainable(model):
            p.grad = all_sum(p.grad) / world()
    optimizer.step()
    if hasattr(penalty, "after_step"):
        penalty.after_step(model, optimizer.param_groups[0]["lr"])
    return all_sum(terms.detach()) / world()


def epoch_batches(
    task: "Data", replay: tuple | None, size: int, seed: int, *place: int
) -> Iterator[tuple]:
    """An epoch's batches (x0, t, eps, y): `size` real images, then as many replayed ones, if any.

    All draws depend only on the run's seed and on `place`, the numbers of the task and the epoch.
    """
    device = task.x.device
    order_rng = rng(device, seed, "order", *place)
    noise_rng = rng(device, seed, "noise", *place)
    replay_rng = rng(device, seed, "replay", *place)
    # Dropout draws from the global generator; its draws must differ between processes.
    torch.manual_seed(rng(device, seed, "dropout", *place).initial_seed() + rank())

    order = torch.randperm(len(task.x), generator=order_rng, device=device)
    full = len(order) // size * size  # the images left out differ between epochs
    for index in order[:full].split(size):
        images = task.x[index]
        labels = task.y[index]
        if replay is not None:
            old_x, old_y = replay
            old = torch.randint(len(old_y), (size,), generator=replay_rng, device=device)
            images = torch.cat([images, old_x[old]])
            labels = torch.cat([labels, old_y[old]])
        x0 = to_float(images)
        t, eps = draw_noise(x0, noise_rng)
        yield x0, t, eps, labels


def train_task(cfg, state: "State", task: "Data", replay: tuple | None, bar: tqdm) -> None:
    """Train the remaining epochs of a task.

    --lr-decay and --ema are not the paper's. With --ema a task ends with its averaged weights.
    """
    model = state.model
    optimizer = state.optimizer
    teacher = state.teacher if METHODS[cfg.method].distill else None
    size, steps = steps_of(cfg, task)
    while state.epoch < cfg.epochs:
        model.train()
        terms = []
        for batch in epoch_batches(task, replay, size, cfg.seed, state.task, state.epoch):
            if cfg.lr_decay == "linear":
                optimizer.param_groups[0]["lr"] = cfg.lr * (1 - state.step / steps)
            terms.append(train_step(model, teacher, state.penalty, optimizer, batch, cfg.bf16))
            if cfg.ema:
                state.average.lerp_(flat(trainable(model)).detach(), 1 - cfg.ema)
            state.step += 1
            bar.update()
        end_epoch(cfg, state, torch.stack(terms).mean(0), bar)
    if cfg.ema:
        vector_to_parameters(state.average, trainable(model))


def evaluate(cfg, model: nn.Module, tasks: list["Data"], features: Callable, device) -> list:
    """FID features (N, d) per task, of one sample for each test image, with the same label."""
    sampled = []
    for k, task in enumerate(tasks):
        # The same noise after every task, so that only the model changes.
        generator = rng(device, cfg.seed, "FID", k)
        noise = torch.randn(task.test_x.shape, generator=generator, device=device)
        y = task.test_y.to(device)
        images = sample_images(cfg, model, noise, y, cfg.sample_steps, f"samples of task {k + 1}")
        sampled.append(features(images))
    return sampled


def afid_and_forgetting(fid: list[list[float | None]]) -> tuple[list[float], float | None]:
    """fid[j][k]: FID on task k after task j, None for k > j. -> AFID after each task, forgetting.

    AFID_j = mean over k <= j of FID_k(m_j); forgetting = (1/T) sum_k (FID_k(m_T) - FID_k(m_k)).
    Joint training has one row, of all tasks, and no forgetting: None. (For joint training, the
    paper's Table 1 gives one FID of all classes, which is fid_pooled here.)
    """
    matrix = np.array(fid, dtype=float)  # None becomes nan
    afid = np.nanmean(matrix, axis=1).tolist()
    if len(matrix) < len(matrix[0]):
        return afid, None
    forgetting = (matrix[-1] - matrix.diagonal()).mean()
    return afid, float(forgetting)


def begin_task(cfg, state: "State") -> None:
    """A frozen copy of the model becomes the teacher; Adam and --ema's average start anew."""
    if METHODS[cfg.method].replay and state.task > 0:
        state.teacher = copy.deepcopy(state.model).eval().requires_grad_(False)
    state.optimizer = torch.optim.Adam(state.model.parameters(), lr=cfg.lr)
    if cfg.ema:
        state.average = flat(trainable(state.model)).detach()


def run(cfg, data: "Data", features: Callable[[Tensor], np.ndarray], device: torch.device) -> dict:
    """Learn task after task, from the checkpoint on if there is one. -> what result.json holds.

    data: all images and labels; features: images uint8 (N, C, H, W) -> FID features (N, d).
    """
    method = METHODS[cfg.method]
    state = new_state(cfg, data, device)
    data, state.class_order = order_classes(cfg, data)
    tasks = split_tasks(data, cfg.tasks)
    stages = [data] if method.joint else tasks  # what is learned in turn
    real = [features(task.test_x) for task in tasks]
    load_checkpoint(cfg, state)
    record_fid_of_real_images(cfg, state, tasks, real, features)

    with progress_of_steps(cfg, state, stages) as bar:
        for k in range(state.task, len(stages)):
            task = stages[k].to(device)
            seen = tasks if method.joint else tasks[: k + 1]
            replay = None
            if state.epoch == 0:  # else the checkpoint restored teacher and Adam
                begin_task(cfg, state)
            if method.replay and k > 0:
                num_old = int(task.y.min())  # labels increase from task to task
                replay = replay_pool(cfg, state.teacher, task.x.shape[1:], num_old)
                show_replay(cfg, k, replay)
                lap(state, "replay")
            train_task(cfg, state, task, replay, bar)
            lap(state, "train")

            theta = flat(trainable(state.model)).detach()  # theta*_k; with --ema the average
            if method.penalty and k > 0:
                state.drift.append(state.penalty.drift(theta).tolist())
            if method.penalty and k + 1 < len(stages):
                generator = rng(device, cfg.seed, "fisher", k)
                fisher = method.fisher(state.model, task.x, task.y, cfg.fisher_samples, generator)
                state.fisher.append(state.penalty.add(fisher, theta))
                lap(state, "fisher")

            sampled = evaluate(cfg, state.model, seen, features, device)
            row = [frechet_distance(a, b) for a, b in zip(real, sampled)]  # of the tasks so far
            state.fid.append(row + [None] * (cfg.tasks - len(row)))
            if method.joint:
                state.fid_pooled = frechet_distance(np.concatenate(real), np.concatenate(sampled))
            show_samples(cfg, state, seen, device)
            lap(state, "fid")
            end_task(cfg, state)
    return finish(cfg, state)


# The paper's method ends here. Below are its network, data and metric, and what a run needs.


# ==================================================================================================
# PART II: NETWORK, DATA AND METRIC
# ==================================================================================================

# ---- Denoiser: eps_theta(x_t, t, y). The UNet of DDPM (arXiv 2006.11239) as diffusers' UNet2DModel
# builds it in the paper's configuration, with the same names: either loads the other's state_dict.

HEAD_CHANNELS = 8  # per attention head
ATTENTION_LEVEL = 2  # 8x8 of 32x32 pixels; two-level networks have attention only in the middle
PAPER_CHANNELS = [128, 256, 256, 256]


class TimeEmbedding(nn.Module):
    """Sinusoids of t (B,), then two linear layers. -> (B, c_out)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, t: Tensor) -> Tensor:
        half = self.linear_1.in_features // 2  # the number of frequencies
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = t[:, None] * frequency
        h = self.linear_1(torch.cat([angle.cos(), angle.sin()], 1))
        return self.linear_2(functional.silu(h))


class Resnet(nn.Module):
    """A residual block. temb (time and class) is added halfway; resample acts on both paths."""

    def __init__(self, c_in, c_out, temb_channels, groups, dropout, resample=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.resample(functional.silu(self.norm1(x)))
        h = self.conv1(h) + self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        h = self.dropout(functional.silu(self.norm2(h)))
        return self.conv_shortcut(self.resample(x)) + self.conv2(h)


class Attention(nn.Module):
    """Self-attention between all pixels, in heads of HEAD_CHANNELS channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = torch.stack([self.to_q(h), self.to_k(h), self.to_v(h)])
        q, k, v = qkv.unflatten(3, (-1, HEAD_CHANNELS)).transpose(2, 3)  # each (B, heads, HW, 8)
        h = functional.scaled_dot_product_attention(q, k, v)
        h = self.to_out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).view_as(x)


class Resample(nn.Module):
    """Halve or double height and width by a 3x3 convolution. temb is unused: a Resnet needs it."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0) if self.up else x)


class Block(nn.Module):
    """A level of the UNet: residual blocks, attention after each if `attends`, and a resampling.

    inputs: the input channels of each residual block; sizes: the other arguments of a Resnet.
    """

    def __init__(self, inputs: list[int], channels: int, attends: bool, sizes: dict):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(c_in, channels, **sizes) for c_in in inputs])
        self.attentions = nn.ModuleList()
        if attends:
            self.attentions.extend([Attention(channels, sizes["groups"]) for _ in inputs])
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layer(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[i](x, temb)
        return self.attentions[i](x) if self.attentions else x


class UNet(nn.Module):
    """Class-conditional denoiser, forward(x_t, t, y) -> eps. The defaults are the paper's network.

    x_t, eps: (B, in_channels, H, W), H, W multiples of 2^(levels - 1); t: (B,) int in 0..999;
    y: (B,) int in 0..num_classes-1. 37,191,681 weights for 1 channel and 10 classes.
    ValueError: channels that group norms or attention heads cannot divide; a dropout outside 0..1.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: list[int] = PAPER_CHANNELS,
        layers_per_block: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        temb_channels = 4 * channels[0]
        groups = max(8, channels[0] // 4)  # the paper's 32 for 128 channels
        multiple = math.lcm(groups, HEAD_CHANNELS)
        if any(c % multiple for c in channels):
            raise ValueError(f"channels {channels} must be multiples of {multiple}")
        sizes = {"temb_channels": temb_channels, "groups": groups, "dropout": dropout}
        last = len(channels) - 1

        self.time_embedding = TimeEmbedding(channels[0], temb_channels)
        self.class_embedding = nn.Embedding(num_classes, temb_channels)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        c_in = channels[0]
        skips = [c_in]  # the channels of the skip connections
        for level, c in enumerate(channels):
            inputs = [c_in] + [c] * (layers_per_block - 1)
            block = Block(inputs, c, attends=level == ATTENTION_LEVEL, sizes=sizes)
            skips += [c] * layers_per_block
            if level < last:
                block.downsamplers.append(self.resample(level, c, False, sizes))
                skips += [c]
            self.down_blocks.append(block)
            c_in = c

        self.mid_block = Block([c_in, c_in], c_in, attends=False, sizes=sizes)
        self.mid_block.attentions.append(Attention(c_in, groups))

        self.up_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            c = channels[level]
            inputs = [c_in + skips.pop()]
            inputs += [c + skips.pop() for _ in range(layers_per_block)]
            block = Block(inputs, c, attends=level == ATTENTION_LEVEL, sizes=sizes)
            if level > 0:
                block.upsamplers.append(self.resample(level, c, True, sizes))
            self.up_blocks.append(block)
            c_in = c

        self.conv_norm_out = nn.GroupNorm(groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)

    @staticmethod
    def resample(level: int, channels: int, up: bool, sizes: dict) -> nn.Module:
        """A convolution, or a residual block at the level with attention."""
        if level != ATTENTION_LEVEL:
            return Resample(channels, up)
        by = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2)
        return Resnet(channels, channels, **sizes, resample=by)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        temb = self.time_embedding(t) + self.class_embedding(y)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, temb)
                skips.append(x)
            for down in block.downsamplers:
                x = down(x, temb)
                skips.append(x)

        first, second = self.mid_block.resnets
        (attention,) = self.mid_block.attentions
        x = second(attention(first(x, temb)), temb)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], 1), temb)
            for up in block.upsamplers:
                x = up(x, temb)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


# ---- Data: images are uint8, and converted to [-1, 1] batch by batch. While a task is learned, its
# images are on the device.


class Data(NamedTuple):
    """Training and test images (N, C, H, H) uint8 in 0..255, and labels (N,) int64 in 0..K-1."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> "Data":
        return Data(*[v.to(device) for v in self])


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8. FloatingPointError: not finite. nan would become black and get an FID."""
    if not x.isfinite().all():
        raise FloatingPointError("a generated image is not finite")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_digits(_: Path) -> Data:
    """scikit-learn's 1,797 digits, 1x8x8: 800 for test, a stratified split with a fixed seed."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    x = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]  # (1797, 1, 8, 8), was 0..16
    x, test_x, y, test_y = model_selection.train_test_split(
        x, digits.target, test_size=800, stratify=digits.target, random_state=0
    )
    return Data(*[torch.from_numpy(v) for v in (x, y, test_x, test_y)])


def load_torchvision(name: str, data_dir: Path) -> Data:
    """A torchvision dataset at 32x32; 28x28 images are padded. Downloads what is missing."""
    from torchvision import datasets

    dataset = getattr(datasets, name)
    parts = []
    for train in (True, False):
        split = dataset(data_dir, train=train, download=True)
        images = torch.as_tensor(split.data)
        if images.ndim == 3:  # grey, (N, 28, 28)
            images = functional.pad(images, (2, 2, 2, 2))[..., None]
        parts += [images.permute(0, 3, 1, 2), torch.as_tensor(split.targets)]
    return Data(*parts)


def load_imagenet32(data_dir: Path) -> Data:
    """The downsampled ImageNet (arXiv 1707.08819), 3x32x32, from its npz files: 12 GB of memory."""

    def load(name: str) -> tuple[Tensor, Tensor]:
        with np.load(data_dir / "imagenet32" / name, allow_pickle=False) as file:
            x = torch.from_numpy(file["data"]).view(-1, 3, 32, 32)
            y = torch.from_numpy(file["labels"].astype(np.int64)) - 1  # stored as 1..1000
        return x, y

    parts = [load(f"train_data_batch_{i}.npz") for i in range(1, 11)]
    x, y = [torch.cat(v) for v in zip(*parts)]
    return Data(x, y, *load("val_data.npz"))


IDX = "raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte (four files, plain or .gz)"
LOADERS = {  # name: (data_dir -> Data, the files that it reads there)
    "digits": (load_digits, "scikit-learn"),
    "mnist": (partial(load_torchvision, "MNIST"), f"MNIST/{IDX}"),
    "fashion": (partial(load_torchvision, "FashionMNIST"), f"FashionMNIST/{IDX}"),
    # CIFAR-10's files are pickles, which could run code: torchvision checks their MD5 first.
    "cifar10": (partial(load_torchvision, "CIFAR10"), "cifar-10-python.tar.gz"),
    "imagenet32": (load_imagenet32, "imagenet32/{train_data_batch_1..10,val_data}.npz"),
}


def load_data(name: str, data_dir: Path) -> Data:
    """A dataset of LOADERS, sorted by class. Stops if it cannot be read or fails check_data."""
    load, files = LOADERS[name]
    try:
        data = load(data_dir)
        check_data(data)
    except Exception as error:  # noqa: BLE001 - a damaged file can raise any
        stop(f"{name} cannot be used ({error}): it needs {files} in --data-dir {data_dir}")
    return choose(data, data.y.argsort(stable=True), data.test_y.argsort(stable=True))


def check_data(data: Data) -> None:
    """ValueError, with what was found, unless data is as Data describes it."""
    classes = int(data.y.max()) + 1
    for split, x, y in (("training", data.x, data.y), ("test", data.test_x, data.test_y)):
        if x.dtype != torch.uint8 or x.shape[1:] != data.x.shape[1:] or x.ndim != 4:
            found = f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"{split} images must be uint8 (N, C, H, H), not {found}")
        if x.max() < 64:  # a loader may have given 0..16, or 0 and 1
            raise ValueError(f"{split} images must be in 0..255, but the largest is {x.max()}")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            found = f"{y.dtype} {tuple(y.shape)} for {len(x)} images"
            raise ValueError(f"{split} labels must be int64 (N,), not {found}")
        if y.min() < 0 or y.unique().numel() != classes or y.bincount().min() < 2:
            raise ValueError(f"{split} labels must be 0..{classes - 1}, each at least twice")


def digest(data: Data) -> str:
    """12 hex digits that identify these images and labels."""
    sha = hashlib.sha256()
    for v in data:
        sha.update(v.cpu().contiguous().numpy())
    return sha.hexdigest()[:12]


def choose(data: Data, train: Tensor, test: Tensor) -> Data:
    """The training and test images at these indices, or masks, with their labels."""
    return Data(data.x[train], data.y[train], data.test_x[test], data.test_y[test])


def limit_classes(data: Data, n: int) -> Data:
    """The first n images of each class; the data must be sorted by class."""
    # Each image's place within its class.
    places = [torch.arange(len(y)) - torch.searchsorted(y, y) for y in (data.y, data.test_y)]
    return choose(data, places[0] < n, places[1] < n)


def order_classes(cfg, data: Data) -> tuple[Data, list[int]]:
    """With --class-order random, renumber the classes. -> data; each label's true class."""
    order = torch.arange(int(data.y.max()) + 1)
    if cfg.class_order == "random":
        order = torch.randperm(len(order), generator=rng(order.device, cfg.seed, "class order"))
    label = order.argsort()  # the new label of each true class
    return data._replace(y=label[data.y], test_y=label[data.test_y]), order.tolist()


def split_tasks(data: Data, tasks: int) -> list[Data]:
    """Tasks of equally many classes, in the order of their labels."""
    classes = int(data.y.max()) + 1
    if classes % tasks:
        stop(f"--tasks {tasks}: {classes} classes cannot be divided equally, choose a divisor")
    size = classes // tasks
    return [choose(data, data.y // size == k, data.test_y // size == k) for k in range(tasks)]


# ---- Metric: FID (arXiv 1706.08500) between a task's test images and as many samples with the same
# labels, on Inception features or, without a download, on a small classifier's.


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features (N_a, d), (N_b, d), N >= 2.

    FloatingPointError: features that are not finite.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise FloatingPointError("the features of some images are not finite")
    A, mean_a = centred(a)
    B, mean_b = centred(b)
    # With S_a = A^T A, S_b = B^T B and M = A B^T, tr((S_a S_b)^1/2) = tr((M M^T)^1/2). Eigenvalues
    # give this trace: a matrix square root is slow, and fails where N < d.
    M = A @ B.T
    cross = np.sqrt(np.linalg.eigvalsh(M @ M.T).clip(0)).sum()
    means = np.square(mean_a - mean_b).sum()
    return float(means + np.square(A).sum() + np.square(B).sum() - 2 * cross)


def centred(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """features (N, d) -> A of at most d rows, with A^T A the covariance; the mean (d,)."""
    features = features.astype(np.float64)
    mean = features.mean(0)
    A = (features - mean) / math.sqrt(len(features) - 1)
    if len(A) > A.shape[1]:
        A = np.linalg.qr(A, mode="r")  # R^T R = A^T A
    return A, mean


@torch.no_grad()
def in_batches(network: Callable, images: Tensor, device: torch.device) -> np.ndarray:
    parts = [network(batch.to(device)).float().cpu() for batch in images.split(200)]
    return torch.cat(parts).numpy()


def inception_features(device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """images (N, 1 or 3, H, W) uint8 -> Inception features (N, 2048). Stops without its weights."""
    import cleanfid.features

    try:
        # This network of clean-fid (arXiv 2104.11222) resizes images itself, as the paper's does.
        network = cleanfid.features.build_feature_extractor("legacy_tensorflow", device, False)
    except Exception as error:  # noqa: BLE001 - a download or a damaged file can raise any
        advice = "put inception-2015-12-05.pt into /tmp, or use --fid classifier"
        stop(f"no Inception weights ({error}): {advice}")

    def features(images: Tensor) -> np.ndarray:
        return in_batches(lambda x: network(x.expand(-1, 3, -1, -1).float()), images, device)

    return features


def classifier_features(
    name: str, data: Data, device: torch.device
) -> Callable[[Tensor], np.ndarray]:
    """images uint8 -> features (N, 64) of a small CNN, trained once on real images and cached."""
    torch.manual_seed(0)
    pixels = math.ceil(data.x.shape[2] / 4) ** 2
    # SiLU, as a ReLU unit that is 0 on a task's images would make their covariance singular.
    model = nn.Sequential(
        nn.Conv2d(data.x.shape[1], 32, 3, 2, 1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * pixels, 64),
        nn.SiLU(),
        nn.Linear(64, int(data.y.max()) + 1),
    ).to(device)
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = cache_dir / "rank1_ewc" / f"classifier-{name}-{digest(data)}.pt"
    if not path.exists():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        generator = rng(torch.device("cpu"), "classifier")
        for _ in progress(range(1000), "classifier for the FID"):
            index = torch.randint(len(data.y), (min(128, len(data.y)),), generator=generator)
            logits = model(to_float(data.x[index].to(device)))
            optimizer.zero_grad()
            functional.cross_entropy(logits, data.y[index].to(device)).backward()
            optimizer.step()
        with atomic_write(path) as file:
            torch.save(model.state_dict(), file)
    model.load_state_dict(load_tensors(path, device, "remove it, and it is trained again"))
    found = in_batches(lambda x: model(to_float(x)), data.test_x, device).argmax(1)
    right = (found == data.test_y.numpy()).mean()
    say(f"the classifier for the FID is right on {right:.1%} of the test images of {name}")
    return lambda images: in_batches(lambda x: model[:-1](to_float(x)), images, device)


def fid_features(cfg, data: Data, device: torch.device) -> Callable[[Tensor], np.ndarray]:
    """The features that --fid names. Sets cfg.fid_features, their name in result.json."""
    if cfg.fid == "classifier":
        cfg.fid_features = f"{cfg.dataset}-classifier"
        return classifier_features(cfg.dataset, data, device)
    if data.x.shape[1] not in (1, 3):
        stop(f"Inception takes 1 or 3 channels, not {data.x.shape[1]}: use --fid classifier")
    cfg.fid_features = "inception, legacy_tensorflow"
    return inception_features(device)


def record_fid_of_real_images(
    cfg, state: "State", tasks: list[Data], real: list, features: Callable
) -> None:
    """What a perfect model would score: FIDs of randomly drawn training images instead of samples.

    The FIDs also identify the feature network: a run that goes on with another is refused.
    """
    generator = rng(torch.device("cpu"), cfg.seed, "real")
    fid = []
    for task, real_features in zip(tasks, real):
        drawn = []
        classes, counts = task.test_y.unique(return_counts=True)
        for c, n in zip(classes, counts):  # as many per class as test images
            x = task.x[task.y == c]
            drawn.append(x[torch.randperm(len(x), generator=generator)[:n]])
        fid.append(frechet_distance(real_features, features(torch.cat(drawn))))
    if state.fid_real and not np.allclose(fid, state.fid_real, rtol=1e-4):
        stop(f"{cfg.out} was begun with another network for the FID: --fresh starts over")
    state.fid_real = fid


# ==================================================================================================
# PART III: A RUN: settings, processes, checkpoints, what it shows, the command line
# ==================================================================================================

# ---- Settings. A dataset's row holds only what differs from the paper's main experiments.

DIGITS = {
    "epochs": 270,
    "batch_size": 64,
    "lr": 4e-3,
    "lr_decay": "linear",
    "lam": 10.0,
    "fisher_samples": 4000,  # 20 per training image: mu from 200 samples would be mostly noise
    "replay_per_class": 200,
    "sample_steps": 20,
    "channels": [16, 32],
    "layers_per_block": 1,
    "fid": "classifier",
}
DATASETS = {
    "digits": DIGITS,
    "mnist": {},
    "fashion": {},
    "cifar10": {},
    "imagenet32": {"tasks": 20, "epochs": 100, "replay_per_class": 1300},
}
# Only these settings may differ when a stopped run goes on.
MAY_CHANGE = ("data_dir", "out", "fresh", "fid_features")
START_OVER = "--fresh starts over, --out names another folder"
CHECKPOINT_SECONDS = 60  # after this time the next end of an epoch writes a checkpoint
SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # the script's version


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def nonnegative(text: str) -> float:
    return check_nonnegative("it", float(text))


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def folder(text: str) -> Path:
    return Path(os.path.expanduser(text))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The paper's settings, overridden by the dataset's row of DATASETS, then the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="The defaults shown are those of the --dataset given; mnist's are the paper's.",
        allow_abbrev=False,
    )
    parser.error = stop
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="the images to learn")
    add("--method", choices=METHODS, default="rank1", help="what protects old classes")
    add("--seed", type=int, default=0, help="of all random draws")
    add("--tasks", type=positive, default=5, help="number of tasks, with equally many classes")
    add("--class-order", choices=("label", "random"), default="label", help="random: by --seed")
    add("--epochs", type=positive, default=200, help="per task")
    add("--batch-size", type=positive, default=128, help="real images; as many replayed are added")
    add("--lr", type=nonnegative, default=2e-4, help="Adam's; each task has a new Adam")
    add("--lr-decay", choices=("none", "linear"), default="none", help="linear: to 0 in each task")
    add("--lam", type=nonnegative, default=15000.0, help="lambda, the weight of EWC's penalty")
    add("--fisher-samples", type=positive, default=10000, help="for mu, and as many others for c*")
    add("--replay-per-class", type=positive, default=5000, help="images of each old class")
    add("--sample-steps", type=positive, default=50, help="DDIM steps, ideally a divisor of 1000")
    add("--replay-steps", type=positive, help="DDIM steps for replay; None: --sample-steps")
    add("--ema", type=nonnegative, default=0.0, help="decay of the weight average; 0: no average")
    add("--channels", type=numbers, default=PAPER_CHANNELS, help="of the UNet's levels, e.g. 16,32")
    add("--layers-per-block", type=positive, default=2, help="residual blocks per level")
    add("--dropout", type=nonnegative, default=0.0, help="in the UNet during training")
    add("--fid", choices=("inception", "classifier"), default="inception", help="FID features")
    add("--limit", type=positive, help="at most this many images per class; None: all")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16; None: GPUs from Ampere on")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--data-dir", type=folder, default=Path("data"), help="datasets; downloads go here")
    add("--out", type=folder, help="results; None: runs/<dataset>/<method>+seed=<seed>")
    add("--fresh", action="store_true", help="delete the run in --out, and start over")

    # The dataset is parsed first, so that --help shows its defaults.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = stop
    first.add_argument("--dataset", choices=DATASETS, default="digits")
    dataset = first.parse_known_args(argv)[0].dataset
    parser.set_defaults(**DATASETS[dataset])
    cfg = parser.parse_args(argv)
    if max(cfg.sample_steps, cfg.replay_steps or 1) > NUM_STEPS:
        stop(f"--sample-steps and --replay-steps must be at most {NUM_STEPS}")
    if METHODS[cfg.method].penalty is None:
        cfg.lam = 0.0
    cfg.out = cfg.out or Path("runs", cfg.dataset, f"{cfg.method}+seed={cfg.seed}")
    return cfg


def settings_of(cfg: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(cfg).items() if name not in MAY_CHANGE}


def steps_of(cfg, task: Data) -> tuple[int, int]:
    """The real images per step, and the training steps of the whole task."""
    size = min(cfg.batch_size, len(task.y))
    if size % world():
        stop(f"--batch-size: {size} images cannot be shared equally by {world()} processes")
    return size, cfg.epochs * (len(task.y) // size)


def stop(message: str) -> NoReturn:
    """End with an error that the user can fix: one line on stderr, exit status 2."""
    print(f"rank1_ewc: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# ---- Processes and device.


def set_up(cfg) -> torch.device:
    """Connect torchrun's processes, and choose this process's device."""
    # cuBLAS reads this when CUDA starts. Without it a seed may give different results on one GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group(timeout=timedelta(days=1))  # gloo on CPUs, NCCL on GPUs
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        stop(f"no --device {cfg.device} ({error}): choose auto, cpu, cuda, cuda:1 or mps")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    elif sum(cfg.channels) < 100:
        torch.set_num_threads(1)  # two threads are faster on idle cores, far slower on busy ones
    if cfg.bf16 is None:
        cfg.bf16 = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    cfg.device = device.type
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # gradients nearly cancel in mu: it needs all digits
    return device


def sample_images(cfg, model: nn.Module, noise: Tensor, y: Tensor, steps: int, name: str) -> Tensor:
    """Samples (N, C, H, W) uint8 of y (N,), noise (M, C, H, W): sample i is from noise[i % M]."""
    model.eval()
    images = torch.zeros(len(y), *noise.shape[1:], dtype=torch.uint8, device=y.device)
    together = 1000 if cfg.device == "cuda" else 200
    size = min(together, math.ceil(len(y) / world()))
    batches = torch.arange(len(y), device=y.device).split(size)
    for i in my_share(progress(batches, name)):
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
            images[i] = to_uint8(ddim_sample(model, noise[i % len(noise)], y[i], steps))
    return all_sum(images)  # the images of other processes are 0 here


# ---- A run's state: what checkpoint.pt holds, and all that a stopped run needs to go on. It has no
# random generator: each epoch, pool and evaluation draws from a new one, seeded by its purpose.


@dataclass
class State:
    model: nn.Module
    data: str  # the digest of images and labels
    shape: list  # of an image, [C, H, W]
    optimizer: torch.optim.Optimizer | None = None
    teacher: nn.Module | None = None  # the frozen model of the previous task, with replay
    penalty: object | None = None
    average: Tensor | None = None  # (D,) of this task's weights, with --ema
    task: int = 0  # tasks done
    epoch: int = 0  # epochs done of the current task
    step: int = 0  # training steps done of the current task
    class_order: list = field(default_factory=list)  # the true class of each label
    fid: list = field(default_factory=list)  # [j][k]: FID of task k after task j
    fid_pooled: float | None = None  # joint: one FID of all classes
    fid_real: list = field(default_factory=list)  # FID of real training images, per task
    fisher: list = field(default_factory=list)  # of each task but the last: c*, ||mu||, ..
    drift: list = field(default_factory=list)  # after each task but the first
    log: list = field(default_factory=list)  # mean losses, an entry per epoch
    seconds: dict = field(default_factory=dict)  # spent on each part
    lap_began: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)  # the time of the last checkpoint


def new_state(cfg, data: Data, device: torch.device) -> State:
    torch.manual_seed(cfg.seed)  # of the global generator, which draws the initial weights
    size = data.x.shape[-1]
    classes = int(data.y.max()) + 1
    smallest = size / 2 ** (len(cfg.channels) - 1)  # each level halves the size
    if smallest % 1 or smallest < 2:  # a group norm needs more than one pixel
        stop(f"--channels: {len(cfg.channels)} levels do not fit images of {size}x{size} pixels")
    try:
        model = UNet(data.x.shape[1], classes, cfg.channels, cfg.layers_per_block, cfg.dropout)
    except ValueError as error:
        stop(f"--channels or --dropout: {error}")
    state = State(model.to(device), digest(data), [*data.x.shape[1:]])
    if METHODS[cfg.method].penalty:
        state.penalty = METHODS[cfg.method].penalty(cfg.lam)
    return state


def lap(state: State, part: str) -> None:
    """Add the time since the last lap to this part's seconds."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    now = time.monotonic()
    state.seconds[part] = state.seconds.get(part, 0.0) + now - state.lap_began
    state.lap_began = now


def end_epoch(cfg, state: State, terms: Tensor, bar: tqdm) -> None:
    """Log the epoch's mean terms (3,), and write a checkpoint about once a minute."""
    state.epoch += 1
    if not (terms.isfinite().all() and flat(trainable(state.model)).isfinite().all()):
        where = f"task {state.task + 1} in epoch {state.epoch}"
        raise FloatingPointError(f"the loss or a weight is not finite in {where}")
    terms = dict(zip(("denoise", "distill", "ewc"), terms.tolist()))
    state.log.append({"task": state.task + 1, "epoch": state.epoch, "step": state.step} | terms)
    bar.set_description(f"task {state.task + 1}/{cfg.tasks} {cfg.method}", refresh=False)
    bar.set_postfix({name: f"{v:.4f}" for name, v in terms.items() if v}, refresh=False)
    if time.monotonic() - state.saved_at > CHECKPOINT_SECONDS:
        save_checkpoint(cfg, state)


def end_task(cfg, state: State) -> None:
    state.task += 1
    state.epoch = state.step = 0
    state.optimizer = state.teacher = state.average = None  # the next task makes new ones
    save_checkpoint(cfg, state)


# ---- Checkpoints and files.


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file and rename it at the end, so that `path` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".rank1_ewc-{os.urandom(4).hex()}")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path, device: torch.device, advice: str) -> dict:
    """Read what torch.save wrote. Stops if a byte has changed, or it holds more than plain data."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # compares the checksums
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file can raise any
        stop(f"{path} is missing or damaged ({type(error).__name__}): {advice}")


def save_checkpoint(cfg, state: State) -> None:
    """Rank 0 writes the state to checkpoint.pt, and the log, for people, to log.jsonl."""
    saved = vars(state) | {"settings": settings_of(cfg), "script": SCRIPT}
    for name in ("model", "optimizer", "teacher"):
        if saved[name]:
            saved[name] = saved[name].state_dict()
    if state.penalty:
        saved["penalty"] = vars(state.penalty)
    if rank() == 0:
        with atomic_write(cfg.out / "checkpoint.pt") as file:
            torch.save(saved, file)
        with atomic_write(cfg.out / "log.jsonl") as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in state.log)
    state.saved_at = time.monotonic()


def load_checkpoint(cfg, state: State) -> None:
    """Restore the state from checkpoint.pt, if there is one."""
    path = cfg.out / "checkpoint.pt"
    device = next(state.model.parameters()).device
    if path.exists():
        saved = load_tensors(path, device, "remove it, or give --fresh")
        refuse_other(cfg, saved.pop("settings"), saved.pop("script"), path)
        if saved["data"] != state.data:
            stop(f"{path} was made with other images or labels: {START_OVER}")
        state.task = saved["task"]
        begin_task(cfg, state)  # makes the optimizer and the teacher that are filled below
        for name in ("model", "optimizer", "teacher"):
            if content := saved.pop(name):
                getattr(state, name).load_state_dict(content)
        if content := saved.pop("penalty"):
            vars(state.penalty).update(content)
        vars(state).update(saved)
        state.lap_began = state.saved_at = time.monotonic()
        done = f"{state.task} of {cfg.tasks} tasks and {state.epoch} epochs"
        say(f"going on from {path}: {done} done")
    elif (cfg.out / "model.pt").exists():
        stop(f"{cfg.out / 'model.pt'} is there, but its checkpoint is gone: name another --out")
    place = torch.tensor([state.task, state.epoch])
    if not torch.equal(all_sum(place.clone()), place * world()):
        stop("the processes do not see the same files: --out must be a folder that all of them see")


def refuse_other(cfg, settings: dict, script: str, path: Path) -> None:
    """Stop if `path` was made with other settings, or by another state of the script."""
    for name, value in settings_of(cfg).items():
        if settings.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            stop(f"{path} was made with {flag} {settings.get(name)}, not {value}: {START_OVER}")
    if script != SCRIPT:
        made = f"{path} was made by script {script}, and this is {SCRIPT}"
        stop(f"{made}: {START_OVER}, or bring back the script that made it")


def delete(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


# ---- What a run shows: a progress bar, a table, pictures, result.json.


def say(text: str) -> None:
    """Print a line above the progress bars, on rank 0 only."""
    if rank() == 0:
        tqdm.write(text)


def progress(items: Iterable | None, name: str, leave: bool = False, **options) -> tqdm:
    """A progress bar, shown by rank 0 only, and rarely redrawn where stderr is a file."""
    seldom = 0.5 if sys.stderr.isatty() else 10
    options |= {"mininterval": seldom, "dynamic_ncols": True, "disable": rank() > 0}
    return tqdm(items, name, leave=leave, **options)


def progress_of_steps(cfg, state: State, stages: list[Data]) -> tqdm:
    """The progress bar of all training steps of the run."""
    steps = [steps_of(cfg, stage)[1] for stage in stages]
    done = sum(steps[: state.task]) + state.step
    count = {"total": sum(steps), "initial": done, "unit": "step", "smoothing": 0}
    return progress(None, cfg.method, leave=True, **count)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images (N, C, H, W) uint8 as one PNG. Small ones are enlarged: 8x8 to 32x32."""
    from torchvision.utils import save_image

    scale = max(1, 32 // images.shape[-1])
    images = functional.interpolate(images.cpu() / 255, scale_factor=scale)
    if rank() == 0:
        with atomic_write(path) as file:
            save_image(images, file, format="png", nrow=columns, pad_value=0.5)


def show_replay(cfg, task: int, replay: tuple[Tensor, Tensor]) -> None:
    """Write replay-task<k>.png, a row of the pool per old class."""
    images = replay[0].unflatten(0, (-1, cfg.replay_per_class))[:, :10]
    save_grid(cfg.out / f"replay-task{task + 1}.png", images.flatten(0, 1), images.shape[1])


def show_samples(cfg, state: State, seen: list[Data], device: torch.device) -> None:
    """After a task: print its row of FIDs and write samples-task<k>.png, a class per row."""
    row = [f"{fid:.1f}" for fid in state.fid[-1] if fid is not None]
    say(f"after task {len(row)}, FID ({cfg.fid_features}): {'  '.join(row)}")
    # Ten samples of each of two classes per task, from the same ten noises for every class.
    y = torch.cat([task.test_y.unique()[:2] for task in seen]).to(device).repeat_interleave(10)
    generator = rng(device, cfg.seed, "picture")
    noise = torch.randn(10, *state.shape, generator=generator, device=device)
    images = sample_images(cfg, state.model, noise, y, cfg.sample_steps, "pictures")
    save_grid(cfg.out / f"samples-task{len(seen)}.png", images, columns=10)


def write_json(path: Path, content: dict) -> None:
    """Write one line per key, for people. ValueError: a number that is not finite."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()
    ]
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_result(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        stop(f"{path} is missing or damaged ({error}): name a finished run, or give --fresh")


def finish(cfg, state: State) -> dict:
    """After the last task: write model.pt and result.json. -> what result.json holds."""
    afid, forgetting = afid_and_forgetting(state.fid)
    result = {
        "dataset": cfg.dataset,
        "method": cfg.method,
        "lam": cfg.lam,
        "seed": cfg.seed,
        "fid_features": cfg.fid_features,
        "fid": state.fid,
        "afid": afid,
        "forgetting": forgetting,
        "fid_pooled": state.fid_pooled,
        "fid_real": state.fid_real,
        "fisher": state.fisher,
        "drift": state.drift,
        "class_order": state.class_order,
        "shape": state.shape,
        "data": state.data,
        "config": settings_of(cfg),
        "script": SCRIPT,
        "processes": world(),
        "versions": {"torch": version("torch")},
        "seconds": {part: round(seconds, 1) for part, seconds in state.seconds.items()},
    }
    if rank() == 0:
        with atomic_write(cfg.out / "model.pt") as file:
            torch.save(state.model.state_dict(), file)
        write_json(cfg.out / "result.json", result)
    return result


def table(result: dict) -> str:
    """A run's FIDs, a line per task learned, and the numbers of its Fishers, as text."""
    import pandas as pd

    tasks = [f"task {k + 1}" for k in range(len(result["fid_real"]))]
    lines = pd.DataFrame(result["fid"], columns=tasks, dtype=float)
    lines.index = [f"after {len(tasks) - fids.count(None)}" for fids in result["fid"]]
    lines["AFID"] = result["afid"]
    lines.loc["real images"] = pd.Series(result["fid_real"], tasks)
    fishers = pd.DataFrame(result["fisher"], tasks[: len(result["fisher"])])
    if "energy" in fishers:
        lines.loc["c*"] = fishers["c_star"]
        lines.loc["||mu||"] = fishers["mu_norm"]
        lines.loc["curvature"] = result["lam"] * fishers["energy"]  # lambda c* ||mu||^2
    text = lines.to_string(na_rep="", float_format="{:.4g}".format)
    title = f"{result['dataset']}, {result['method']}: FID of each task ({result['fid_features']})"
    forgetting = "-" if result["forgetting"] is None else f"{result['forgetting']:.2f}"
    end = f"AFID {result['afid'][-1]:.2f}   forgetting {forgetting}   (lower is better)"
    return f"\n{title}\n{text}\n\n{end}\n"


# ---- Command line.


def begin_run(cfg, device: torch.device) -> dict:
    """Load the data and the network of the FID, then run."""
    if rank() > 0:
        dist.barrier()  # until rank 0 has downloaded what is missing
    data = load_data(cfg.dataset, cfg.data_dir)
    features = fid_features(cfg, data, device)
    if rank() == 0 and world() > 1:
        dist.barrier()
    if cfg.limit:
        data = limit_classes(data, cfg.limit)
        cfg.fid_features += f", limit {cfg.limit}"
    if device.type == "cpu" and sum(cfg.channels) > 256:
        say("note: this network takes months on a CPU; `make look` has a small one")
    return run(cfg, data, features, device)


def main(argv: list[str] | None = None) -> dict:
    """Start a run, go on with a stopped one, or print a finished one."""
    import filelock

    cfg = parse_args(argv)
    finished = cfg.out / "result.json"
    try:
        device = set_up(cfg)
        if finished.exists() and not cfg.fresh:
            result = read_result(finished)
            refuse_other(cfg, result["config"], result["script"], finished)
            message = f"{finished} holds this finished run; --fresh starts it over"
        else:
            cfg.out.mkdir(parents=True, exist_ok=True)
            # Only one run may write into --out. The kernel drops the lock if its holder dies.
            lock = filelock.FileLock(cfg.out / ".lock", blocking=False)
            with lock if rank() == 0 else nullcontext():
                if rank() == 0:
                    delete(cfg.out, ".rank1_ewc-*")  # half-written files of a killed run
                if rank() == 0 and cfg.fresh:
                    delete(cfg.out, "result.json", "checkpoint.pt", "model.pt", "log.jsonl")
                    delete(cfg.out, "samples-task*.png", "replay-task*.png")
                result = begin_run(cfg, device)
            picture = cfg.out / f"samples-task{cfg.tasks}.png"
            message = f"Look at {picture}; beside it are result.json, log.jsonl and model.pt"
    except KeyboardInterrupt as interrupt:
        status = interrupt.args[0] if interrupt.args else signal.SIGINT
        message = "interrupted; the same command, without --fresh, goes on from the last checkpoint"
        print(f"\nrank1_ewc: {message}", file=sys.stderr)
        raise SystemExit(128 + status) from None
    except FloatingPointError as error:
        stop(f"{error}: lower --lr (now {cfg.lr:g}) or --lam (now {cfg.lam:g})")
    except filelock.Timeout:
        stop(f"another run writes into {cfg.out}: wait for it, or name another folder with --out")
    except OSError as error:
        stop(f"{error.filename or cfg.out} cannot be read or written ({error.strerror or error})")
    say(f"{table(result)}\n{message}")
    return result


def program() -> None:
    """main() as a program, which handles SIGTERM and closes the process group."""

    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    # Clusters send SIGTERM before they kill: it acts as Ctrl-C does, with another exit status.
    signal.signal(signal.SIGTERM, interrupt)
    main()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    program()
