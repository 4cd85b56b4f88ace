"""The claims of rank1_ewc.py, a test each; the oracle is the slow, obvious way."""

import contextlib
import copy
import csv
import ctypes
import gc
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from urllib.error import URLError

import cleanfid.fid
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import rank1_ewc as r

SCRIPT = Path(r.__file__)
CPU = torch.device("cpu")
QUICK = ["--channels=8", "--epochs=1", "--sample-steps=2", "--replay-per-class=3", "--fisher-samples=200"]
torch.set_num_threads(1)  # these networks are too small to share out, and a busy machine makes it very slow


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path_factory):
    """Away from the user's runs and cache; the classifier of the digits is trained once for all tests."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(r, "CACHE", tmp_path_factory.getbasetemp() / "rank1_ewc")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_unet(seed=0, channels=(8, 8, 8), **settings):
    torch.manual_seed(seed)
    return r.UNet(1, 10, channels, layers_per_block=1, **settings)


def small_images(n=6, seed=0, size=8):
    images = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=generator(seed))
    return images, torch.arange(n) % 10


# ---- denoiser and diffusion


@pytest.mark.parametrize(
    ("in_channels", "num_classes", "count"), [(1, 10, 37191681), (3, 10, 37196291), (3, 1000, 37703171)]
)
def test_unet_has_as_many_parameters_as_the_papers(in_channels, num_classes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in r.UNet(in_channels, num_classes).parameters()) == count


def test_parameters_have_the_names_that_diffusers_gives_them():
    with torch.device("meta"):
        names = r.UNet(1, 10).state_dict().keys()
    for name in (
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "class_embedding.weight",
        "down_blocks.0.downsamplers.0.conv.weight",
        "down_blocks.1.resnets.0.conv_shortcut.bias",
        "down_blocks.2.downsamplers.0.conv1.weight",
        "down_blocks.2.attentions.1.group_norm.weight",
        "mid_block.attentions.0.to_out.0.weight",
        "up_blocks.0.upsamplers.0.conv.weight",
        "up_blocks.1.upsamplers.0.time_emb_proj.bias",
        "up_blocks.3.resnets.2.conv_shortcut.weight",
        "conv_norm_out.bias",
        "conv_out.weight",
    ):
        assert name in names


def diffusers_unet(channels, layers_per_block):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    down, up = ["DownBlock2D"] * len(channels), ["UpBlock2D"] * len(channels)
    if len(channels) > 2:
        down[2], up[len(channels) - 3] = "AttnDownBlock2D", "AttnUpBlock2D"
    return diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=layers_per_block,
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=10,
        norm_num_groups=channels[0] // 4,
        dropout=0.1,
    )


@pytest.mark.parametrize("settings", [((128, 256, 256, 256), 2), ((16, 32), 1), ((8, 16, 24), 1)])
def test_unet_and_diffusers_share_weights_both_ways_and_give_the_same_output(settings):
    theirs, ours = diffusers_unet(*settings).eval(), r.UNet(1, 10, *settings).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, y = torch.randn(2, 1, 16, 16, generator=generator()), torch.tensor([3, 777]), torch.tensor([1, 9])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y), theirs(x, t, class_labels=y).sample, atol=1e-4, rtol=0)


def test_ddim_and_diffusers_scheduler_paint_the_same_images():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model, scheduler = small_unet().eval(), diffusers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(50)
    x = noise = torch.randn(4, 1, 8, 8, generator=generator())
    y = torch.arange(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(4), y), t, x).prev_sample
    torch.testing.assert_close(r.ddim_sample(model, noise, y, 50), x, atol=1e-3, rtol=0)


def test_add_noise_has_the_mean_and_variance_of_the_forward_process():
    betas = np.linspace(1e-4, 0.02, 1000)
    for t in (0, 300, 999):
        abar = math.prod(1 - betas[: t + 1])
        x_t = r.add_noise(
            torch.full((1, 1, 400, 400), 0.7),
            torch.tensor([t]),
            torch.randn(1, 1, 400, 400, generator=generator()),
        )
        assert x_t.mean().item() == pytest.approx(math.sqrt(abar) * 0.7, abs=0.01)
        assert x_t.var().item() == pytest.approx(1 - abar, rel=0.02, abs=1e-6)


def gaussian_denoiser(mean, std):
    """E[eps | x_t], in closed form, where every pixel of x_0 is N(mean, std^2)."""

    def predict(x, t, y):
        abar = r.alphas_cumprod(CPU)[t][:, None, None, None]
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)

    return predict


def test_ddim_turns_noise_into_the_gaussian_whose_optimal_denoiser_it_is_given():
    # The probability-flow ODE maps x_999 linearly onto N(mean, std^2); 1000 steps follow it closely.
    mean, std = 0.1, 0.2
    noise, y = torch.randn(2000, 1, 2, 2, generator=generator()), torch.zeros(2000, dtype=torch.long)
    abar = r.alphas_cumprod(CPU)[999].item()
    exact = mean + std * (noise - math.sqrt(abar) * mean) / math.sqrt(abar * std**2 + 1 - abar)
    x0 = r.ddim_sample(gaussian_denoiser(mean, std), noise, y, 1000)
    torch.testing.assert_close(x0, exact, atol=0.02, rtol=0)
    assert x0.std().item() == pytest.approx(std, rel=0.03)


def test_ddim_clips_its_estimate_of_the_image_to_the_pixel_range():
    x0 = r.ddim_sample(lambda x, t, y: -5 * x, torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.long), 5)
    assert x0.abs().max() <= 1


def test_uint8_images_survive_the_way_to_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(r.to_uint8(r.to_float(every)), every)
    assert r.to_float(every).min() == -1
    assert r.to_float(every).max() == 1


# ---- Fisher


def gradients_one_by_one(model, images, labels, n, batch, seed):
    """g_i (n, D) in float64, a backward pass per sample, on the draws that the estimators make."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    g = []
    for draw in r.fisher_draws(images, labels, n, batch, generator(seed)):
        for x0, t, eps, y in zip(*draw):
            x_t = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
            loss = ((model(x_t[None], t[None], y[None])[0] - eps) ** 2).mean()
            g.append(r.flat(torch.autograd.grad(loss, model.parameters())))
    return torch.stack(g).double()


@pytest.mark.parametrize("n", [10, 40, 4000])
def test_fisher_samples_are_spread_over_all_images_with_their_labels_and_over_all_timesteps(n):
    images, labels = small_images(40)
    labels = labels.sort().values  # as some datasets are stored: class after class
    x0, t, eps, y = (torch.cat(v) for v in zip(*r.fisher_draws(images, labels, n, 7, generator())))
    which = [int((r.to_float(images) == x).flatten(1).all(1).nonzero()) for x in x0]
    assert labels[which].equal(y)
    assert set(y.tolist()) == set(range(10))
    assert set(np.bincount(which, minlength=40)) == {n // 40} if n >= 40 else len(set(which)) == n
    assert t.min() < 1000 / n**0.5 < 1000 - 1000 / n**0.5 < t.max()
    assert eps.mean().abs() < 0.1


def draws_of(images, labels, n, batch, seed=3):
    return lambda most=math.inf: r.fisher_draws(images, labels, min(n, most), batch, generator(seed))


@pytest.mark.parametrize("n", [6, 10])  # each image once, and some twice
def test_mu_and_c_star_match_per_sample_gradients(n):
    model, (images, labels) = small_unet(dropout=0.5), small_images()
    (mu,), (c_star,) = r.rank1_fisher(model, draws_of(images, labels, n, 4))
    g = gradients_one_by_one(model, images, labels, n, 4, seed=3)
    mean = g.mean(0)
    torch.testing.assert_close(mu.double(), mean, atol=1e-3 * mean.abs().max().item(), rtol=0)
    assert float(c_star) == pytest.approx(float((g @ mean).square().mean() / mean.norm() ** 4), rel=1e-3)


def test_diagonal_fisher_matches_per_sample_gradients():
    model, (images, labels) = small_unet(dropout=0.5), small_images()
    diagonal = r.diagonal_fisher(model, draws_of(images, labels, 10, 4))
    exact = gradients_one_by_one(model, images, labels, 10, 4, seed=3).square().mean(0)
    torch.testing.assert_close(diagonal.double(), exact, atol=1e-3 * exact.max().item(), rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_c_star_is_at_least_one(seed):
    assert r.rank1_fisher(small_unet(seed), draws_of(*small_images(seed=seed), 8, 4, seed))[1] >= 1


def test_eigenpairs_from_the_gram_matrix_are_those_of_f():
    G = torch.randn(7, 30, generator=generator()) * torch.arange(1.0, 31)
    values, vectors = r.eigenpairs(G, 3)
    F = (G.T @ G / 7).double()
    exact, exact_vectors = (v.flip(-1) for v in torch.linalg.eigh(F))
    torch.testing.assert_close(values, exact[:7], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        (vectors.double() @ exact_vectors[:, :3]).abs(), torch.eye(3).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("k", [1, 4])
def test_rank_k_fisher_is_the_best_of_rank_k_for_the_per_sample_gradients(k):
    model, (images, labels) = small_unet(dropout=0.5), small_images()
    v, values = r.rank_k_fisher(k, model, draws_of(images, labels, 12, 4))
    g = gradients_one_by_one(model, images, labels, 12, 4, seed=3)  # F = g^T g / 12
    _, singular, directions = torch.linalg.svd(g / math.sqrt(12), full_matrices=False)
    torch.testing.assert_close(values.double(), singular[:k] ** 2, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        (v.double() @ directions[:k].T).abs(), torch.eye(k).double(), atol=1e-2, rtol=0
    )


def test_rank_k_fisher_keeps_no_more_gradients_than_fit(monkeypatch):
    model, (images, labels), kept = small_unet(), small_images(), []
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(r, "GRADIENT_FLOATS", 5 * weights + 1)
    monkeypatch.setattr(r, "eigenpairs", lambda G, k: kept.append(G.shape) or (G[:, 0], G[:k]))
    r.rank_k_fisher(2, model, draws_of(images, labels, 12, 4))
    monkeypatch.setattr(r, "GRADIENT_FLOATS", 100 * weights)
    monkeypatch.setattr(r, "GRADIENTS", 7)
    r.rank_k_fisher(2, model, draws_of(images, labels, 12, 4))
    assert kept == [(5, weights), (7, weights)]


# ---- the theory, where it is exact


class ScaledIdentity(torch.nn.Module):
    """eps_hat = (a^T b) x_t: what Proposition 1 has the best denoiser become; linear in x_t, not in theta."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.randn(20, generator=generator(s))) for s in range(2))

    def forward(self, x, t, y):
        return (self.a @ self.b) * x


class AnyMatrix(torch.nn.Module):
    """eps_hat = A x_t, every entry of A free: linear too, but not a scaled identity."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(torch.eye(16))

    def forward(self, x, t, y):
        return (x.flatten(1) @ self.A.T).view_as(x)


def test_proposition_1_at_high_noise_the_best_denoiser_is_a_scaled_identity():
    x, t = torch.randn(500, 1, 4, 4, generator=generator()), torch.tensor([0, 300, 600, 999])
    abar = r.alphas_cumprod(CPU)[t]
    mean, std, mse = 0.4, 0.2, []
    for i in range(4):
        x_t = r.add_noise(mean + std * x, t[i].expand(500), torch.randn(x.shape, generator=generator(1)))
        eps = gaussian_denoiser(mean, std)(x_t, t[i].expand(500), None)
        mse.append(float((x_t - (1 - abar[i]).sqrt() * eps).square().mean()))
    assert mse[0] == pytest.approx(mean**2 + std**2, rel=0.05)  # abar E[x_0^2]
    assert mse[2:] == pytest.approx((abar[2:] * mean**2).tolist(), rel=0.05)  # abar E[x_0]^2
    assert mse[3] < 1e-4


def test_proposition_2_the_gradients_of_a_scaled_identity_all_lie_on_one_line():
    g = gradients_one_by_one(ScaledIdentity(), *small_images(), 12, 4, seed=3)
    directions = g / g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        (directions @ directions.T).abs(), torch.ones(12, 12).double(), atol=1e-6, rtol=0
    )
    assert g.norm(dim=1).std() > 0.01 * g.norm(dim=1).mean()  # and differ in length: c(x_t)


def test_theorem_1_the_fisher_of_a_scaled_identity_is_c_star_mu_mu_transposed():
    model, draws = ScaledIdentity(), draws_of(*small_images(), 12, 4)
    (mu,), (c_star,) = r.rank1_fisher(model, draws)
    g = gradients_one_by_one(model, *small_images(), 12, 4, seed=3)
    F = g.T @ g / 12
    torch.testing.assert_close(c_star * torch.outer(mu, mu).double(), F, atol=1e-5 * float(F.norm()), rtol=0)
    found, _, _ = r.geometry(model, draws())
    assert found["eigenvalues"][1] < 1e-6 * found["eigenvalues"][0]
    assert found["error"]["c* mu mu^T"] < 1e-3
    assert found["error"]["diagonal"] > 0.5
    assert found["cos_mu_top"] == pytest.approx(1, abs=1e-5)


def test_linear_alone_is_not_enough_for_rank_1():
    # With every entry of A free, the gradients (A x_t - eps) x_t^T share no direction.
    found, _, _ = r.geometry(AnyMatrix(), draws_of(*small_images(size=4), 60, 20)())
    assert found["eigenvalues"][1] > 0.2 * found["eigenvalues"][0]


def test_the_geometry_from_the_gram_matrix_is_that_of_the_whole_matrix():
    model, draws = AnyMatrix(), draws_of(*small_images(size=4), 12, 4)
    found, mu, all_cos = r.geometry(model, draws())
    g = gradients_one_by_one(model, *small_images(size=4), 12, 4, seed=3)
    F, mean = g.T @ g / 12, g.mean(0)
    values, vectors = torch.linalg.eigh(F)
    outer, c_star = torch.outer(mean, mean), float(mean @ F @ mean / mean.norm() ** 4)
    approximations = {
        "diagonal": F.diag().diag(),
        "mu mu^T": outer,
        "c* mu mu^T": c_star * outer,
        "best of rank 1": values[-1] * torch.outer(vectors[:, -1], vectors[:, -1]),
    }
    exact = {name: float((F - other).norm() / F.norm()) for name, other in approximations.items()}
    assert found["error"] == pytest.approx(exact, rel=1e-3)
    torch.testing.assert_close(mu.double(), mean, atol=1e-6, rtol=1e-4)
    assert found["c_star"] == pytest.approx(c_star, rel=1e-4)
    assert found["eigenvalues"] == pytest.approx(values.flip(0)[:5].tolist(), rel=1e-3)
    assert found["trace"] == pytest.approx(float(F.trace()), rel=1e-4)
    assert found["top_share"] == pytest.approx(float(values[-1] / F.trace()), rel=1e-3)
    assert found["mu_noise"] == pytest.approx(float(F.trace() / 12) ** 0.5, rel=1e-3)
    assert found["cos_mu_top"] == pytest.approx(abs(float(vectors[:, -1] @ mean / mean.norm())), rel=1e-3)
    cos = (g @ mean).abs() / g.norm(dim=1) / mean.norm()
    assert all_cos.tolist() == pytest.approx(cos.tolist(), abs=1e-3)
    cos_top = (g @ vectors[:, -1]).abs() / g.norm(dim=1)
    assert found["cos_top"] == pytest.approx(float(cos_top.mean()), abs=1e-3)


# ---- penalties: against the paper's formulas with every theta*_k kept


def three_tasks(dim=50):
    """mu_k, c*_k, F_k and theta*_k of three tasks, and weights on the way through a fourth."""
    rows = torch.randn(10, dim, generator=generator(1))
    tasks = [(0.3 * rows[k], 1.5 + k, rows[3 + k].square(), rows[6 + k]) for k in range(3)]
    return tasks, tasks[-1][3] + 0.1 * rows[9]


def value_and_gradient(penalty, theta):
    theta = theta.clone().requires_grad_()
    value = penalty(theta)
    return value.detach(), torch.autograd.grad(value, theta)[0]


def rank1(mu, c_star):
    return mu[None], torch.tensor([c_star])


def test_rank1_penalty_and_its_gradient_equal_the_formula_with_stored_weights():
    tasks, theta = three_tasks()
    penalty = r.LowRankPenalty(lam=7.0)
    for mu, c_star, _, theta_star in tasks:
        penalty.add(rank1(mu, c_star), theta_star)
    penalty = penalty.start(tasks[-1][3])

    def formula(theta):
        return 7 / 2 * sum(c * (mu.double() @ (theta - star.double())) ** 2 for mu, c, _, star in tasks)

    for ours, exact in zip(value_and_gradient(penalty, theta), value_and_gradient(formula, theta.double())):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_rank_k_penalty_and_its_gradient_equal_the_formula_with_stored_weights():
    tasks, theta = three_tasks()
    fishers = [(torch.stack([tasks[k][0], tasks[k - 1][0]]), torch.tensor([2.0, 0.5 + k])) for k in range(3)]
    penalty = r.LowRankPenalty(lam=7.0)
    for fisher, (_, _, _, theta_star) in zip(fishers, tasks):
        penalty.add(fisher, theta_star)
    penalty = penalty.start(tasks[-1][3])

    def formula(theta):
        terms = [
            c * (v.double() @ (theta - star.double())) ** 2
            for (vectors, values), (_, _, _, star) in zip(fishers, tasks)
            for v, c in zip(vectors, values)
        ]
        return 7 / 2 * sum(terms)

    for ours, exact in zip(value_and_gradient(penalty, theta), value_and_gradient(formula, theta.double())):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [1e-3, 10.0])
def test_the_proximal_step_minimizes_penalty_plus_distance(eta):
    tasks, theta = three_tasks()
    penalty = r.LowRankPenalty(lam=7.0)
    for mu, c_star, _, theta_star in tasks:
        penalty.add(rank1(mu, c_star), theta_star)
    value, step = penalty.start(tasks[-1][3]), penalty.start_proximal(tasks[-1][3])
    z = step(theta, eta)
    gradient = value_and_gradient(lambda z: value(z) + (z - theta).square().sum() / (2 * eta), z)[1]
    before = value_and_gradient(value, theta)[1]
    assert gradient.norm() < 1e-3 * before.norm()


def test_diagonal_penalty_and_its_gradient_equal_the_formula_with_stored_weights():
    tasks, theta = three_tasks()
    for _, _, fisher, _ in tasks:
        fisher[:5] = 0  # weights that no task cares for
    penalty = r.DiagonalPenalty(lam=7.0)
    for _, _, fisher, theta_star in tasks:
        penalty.add(fisher, theta_star)
    penalty = penalty.start(tasks[-1][3])

    def formula(theta):
        return 7 / 2 * sum((f.double() * (theta - star.double()) ** 2).sum() for _, _, f, star in tasks)

    for ours, exact in zip(value_and_gradient(penalty, theta), value_and_gradient(formula, theta.double())):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_penalties_keep_no_copy_of_the_old_weights_per_task():
    tasks, _ = three_tasks(dim=50)
    low_rank, diagonal = r.LowRankPenalty(1.0), r.DiagonalPenalty(1.0)
    for mu, c_star, fisher, theta_star in tasks:
        low_rank.add(rank1(mu, c_star), theta_star)
        diagonal.add(fisher, theta_star)
    low_rank.start(theta_star)
    diagonal.start(theta_star)
    kept = [
        {name: tuple(v.shape) for name, v in vars(penalty).items() if torch.is_tensor(v)}
        for penalty in (low_rank, diagonal)
    ]
    assert kept == [{"a": (3, 50)}, {"H": (50,), "center": (50,)}]
    assert len(low_rank.b) == 3


def test_rank1_penalty_is_exact_at_the_papers_size_in_float32():
    D, g = 37_191_681, generator(2)
    mu = 1e-5 * torch.randn(D, generator=g)
    theta_star, theta_start = (0.05 * torch.randn(D, generator=g) for _ in range(2))
    theta = theta_start + 1e-5 * torch.randn(D, generator=g) + 0.01 * mu
    penalty = r.LowRankPenalty(lam=15000.0)
    penalty.add(rank1(mu, 2.5), theta_star)
    penalty.add(rank1(mu, 2.5), theta_start)
    penalty = penalty.start(theta_start)
    a = math.sqrt(2.5) * mu.double()
    from_start = a @ (theta.double() - theta_start.double())
    from_first = a @ (theta.double() - theta_star.double())
    exact = 15000 / 2 * (from_start**2 + from_first**2)
    assert penalty(theta).item() == pytest.approx(exact.item(), rel=1e-4)
    # With the last task alone the penalty is tiny, and computed as a^T theta - b in float32 it would drown.
    alone = r.LowRankPenalty(lam=15000.0)
    alone.add(rank1(mu, 2.5), theta_start)
    alone = alone.start(theta_start)
    exact = (15000 / 2 * from_start**2).item()
    naive = 15000 / 2 * (a.float() @ theta - a.float() @ theta_start).item() ** 2
    assert alone(theta).item() == pytest.approx(exact, rel=1e-3)
    assert naive != pytest.approx(exact, rel=1e-3)


# ---- replay and distillation


def test_replay_pool_holds_equally_many_uint8_images_of_every_old_class():
    class Painter(torch.nn.Module):
        def forward(self, x_t, t, y):  # an eps that leads to an image as grey as the class says
            abar = r.alphas_cumprod(CPU)[t][:, None, None, None]
            return (x_t - abar.sqrt() * (y[:, None, None, None] / 5 - 0.5)) / (1 - abar).sqrt()

    x, y = r.replay_pool(Painter(), (1, 8, 8), 4, 30, 2, generator(), "pool")
    assert x.dtype == torch.uint8
    assert x.shape == (120, 1, 8, 8)
    assert y.bincount().tolist() == [30, 30, 30, 30]
    grey = torch.tensor([64, 89, 115, 140])  # (y / 5 - 0.5 + 1) * 127.5
    assert (x.float() - grey[y][:, None, None, None]).abs().max() <= 1


def test_distillation_has_no_gradient_where_student_and_teacher_agree():
    student = small_unet().eval()
    x0, y = torch.randn(6, 1, 8, 8, generator=generator()), torch.arange(6)
    draw = x0, *r.draw_noise(x0, generator()), y
    _, same = r.losses(student, copy.deepcopy(student), draw, 3)
    _, other = r.losses(student, small_unet(seed=1).eval(), draw, 3)
    norms = [r.flat(torch.autograd.grad(loss, student.parameters())).norm() for loss in (same, other)]
    assert norms[0] < 1e-5 * norms[1]  # not 0: the teacher's smaller batch may be rounded differently


def test_one_student_pass_gives_both_losses_and_the_teacher_sees_its_noisy_replay_images():
    student, teacher, seen = small_unet().eval(), small_unet(seed=1).eval(), {}

    def spy(name, model):
        def predict(x_t, t, y):
            assert name not in seen
            seen[name] = (x_t, t, y)
            return model(x_t, t, y)

        return predict

    x0, y = torch.randn(6, 1, 8, 8, generator=generator()), torch.arange(6)
    t, eps = r.draw_noise(x0, generator(5))
    denoise, distill = r.losses(spy("student", student), spy("teacher", teacher), (x0, t, eps, y), 4)
    for ours, theirs in zip(seen["student"], seen["teacher"]):
        assert torch.equal(ours[4:], theirs)
    expected = [
        r.per_sample_loss(student, x0[i : i + 1], t[i : i + 1], eps[i : i + 1], y[i : i + 1])
        for i in range(6)
    ]
    torch.testing.assert_close(denoise, torch.cat(expected).mean())
    x_t = r.add_noise(x0, t, eps)[4:]
    difference = student(x_t, t[4:], y[4:]) - teacher(x_t, t[4:], y[4:])
    torch.testing.assert_close(distill, difference.square().mean())


# ---- metric


def test_frechet_distance_equals_clean_fids():
    a, b = (torch.randn(200, 8, generator=generator(s)).numpy() * (1 + s) + s for s in range(2))
    exact = cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert r.frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)


def test_frechet_distance_equals_a_case_solved_by_hand():
    # Uncorrelated axes: each adds (difference of means)^2 + (difference of standard deviations)^2.
    a = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # variance 4/3 on both axes
    by_hand = 2 * 5**2 + 2 * (3 * math.sqrt(4 / 3) - math.sqrt(4 / 3)) ** 2
    assert r.frechet_distance(a, 3 * a + 5) == pytest.approx(by_hand)
    assert r.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_afid_and_forgetting_equal_a_matrix_worked_by_hand():
    afid, forgetting = r.afid_and_forgetting([[4.0, None, None], [6.0, 10.0, None], [9.0, 12.0, 3.0]])
    assert afid == [4, 8, 8]
    assert forgetting == pytest.approx((5 + 2 + 0) / 3)
    assert r.afid_and_forgetting([[4.0, 5.0, 9.0]]) == ([6], None)  # joint training


def test_inception_features_give_clean_fid_299_pixel_rgb_in_0_to_255(monkeypatch):
    shapes = []

    def mean_colour(batch):
        shapes.append(tuple(batch.shape[1:]))
        return batch.mean((2, 3))

    monkeypatch.setattr(r.cleanfid.features, "build_feature_extractor", lambda *_, **__: mean_colour)
    images = torch.arange(120, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    features = r.inception_features(CPU)(images)
    assert set(shapes) == {(3, 299, 299)}
    np.testing.assert_allclose(features, np.arange(120)[:, None].repeat(3, 1), atol=1e-3)


def test_classifier_is_good_and_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(r, "CACHE", tmp_path)
    data = r.load_digits(tmp_path)
    features, accuracy = r.classifier_features("digits", data, CPU)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again, _ = r.classifier_features("digits", data, CPU)
    assert accuracy > 0.95
    assert file.stat().st_mtime_ns == written
    assert np.array_equal(features(data.test_x[:20]), again(data.test_x[:20]))
    assert features(data.test_x[:20]).shape == (20, 64)


# ---- data


def test_digits_are_all_there_once_with_at_least_150_test_images_a_task():
    data = r.load_digits(Path())
    assert len(data.y) + len(data.test_y) == 1797
    assert (data.x.min(), data.x.max()) == (0, 255)
    assert min(len(task.test_y) for task in r.split_tasks(data, 5)) >= 150


@pytest.mark.parametrize(("tasks", "per_task"), [(5, 2), (20, 50)])
def test_tasks_hold_every_class_once_in_label_order(tasks, per_task):
    y = torch.randint(tasks * per_task, (20000,), generator=generator())
    images = y[:, None].expand(-1, 4)  # an image shows its label
    data = r.sort_classes(r.Data(images, y, images[:9000], y[:9000]))
    parts = r.split_tasks(data, tasks)
    assert len(parts) == tasks
    for k, part in enumerate(parts):
        classes = list(range(k * per_task, (k + 1) * per_task))
        for x, labels in ((part.x, part.y), (part.test_x, part.test_y)):
            assert sorted(set(labels.tolist())) == classes
            assert torch.equal(x[:, 0], labels)
    assert sum(len(part.y) for part in parts) == 20000
    assert sum(len(part.test_y) for part in parts) == 9000
    assert parts[0].x.untyped_storage().data_ptr() == parts[1].x.untyped_storage().data_ptr()  # views


def test_limit_keeps_the_first_images_of_each_class():
    data = r.load_digits(Path())
    few = r.limit_classes(data, 3)
    assert few.y.tolist() == few.test_y.tolist() == [c for c in range(10) for _ in range(3)]
    for c in range(10):
        assert torch.equal(few.x[few.y == c], data.x[data.y == c][:3])


def write_idx(folder, train=60000, test=10000):
    """MNIST files in torchvision's layout, the pixels counting up."""
    folder.mkdir(parents=True)
    for split, n in (("train", train), ("t10k", test)):
        head = b"".join(i.to_bytes(4, "big") for i in (0x803, n, 28, 28))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + bytes(i % 251 for i in range(784)) * n)
        head = b"".join(i.to_bytes(4, "big") for i in (0x801, n))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(head + bytes(range(10)) * (n // 10))


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx_files_are_read_and_padded_to_32(tmp_path, no_network, name):
    write_idx(tmp_path / {"mnist": "MNIST", "fashion": "FashionMNIST"}[name] / "raw")
    data = r.LOADERS[name](tmp_path)
    assert data.x.shape == (60000, 1, 32, 32)
    assert data.test_x.shape == (10000, 1, 32, 32)
    assert data.y.equal(torch.arange(10).repeat_interleave(6000))
    assert data.test_y.equal(torch.arange(10).repeat_interleave(1000))
    inside = data.x[5, 0, 2:30, 2:30].flatten().tolist()
    assert inside == [i % 251 for i in range(784)]
    assert data.x[5].sum() == sum(inside)


def test_cifar10_is_read_from_files_whose_checksum_is_right_and_from_no_other(
    tmp_path, no_network, monkeypatch, capsys
):
    dataset = torchvision.datasets.CIFAR10
    (tmp_path / dataset.base_folder).mkdir()

    def write(name, contents):
        path = tmp_path / dataset.base_folder / name
        path.write_bytes(pickle.dumps(contents))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    def batch(i):
        images = np.full((10, 3, 32, 32), i, np.uint8)
        images[:, 1] = np.arange(32)[:, None]  # green: the row
        images[:, 2] = np.arange(32)  # blue: the column
        return {"data": images.reshape(10, 3072), "labels": [*range(9, -1, -1)]}

    monkeypatch.setattr(dataset, "train_list", [write(f"data_batch_{i}", batch(i)) for i in range(1, 6)])
    monkeypatch.setattr(dataset, "test_list", [write("test_batch", batch(6))])
    md5 = write("batches.meta", {"label_names": ["any"] * 10})[1]
    monkeypatch.setattr(dataset, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    data = r.load_cifar10(tmp_path)
    assert (data.x.dtype, data.x.shape, data.test_x.shape) == (torch.uint8, (50, 3, 32, 32), (10, 3, 32, 32))
    assert data.y.tolist() == [c for c in range(10) for _ in range(5)]
    assert data.x[:5, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert data.x[7, 1:, 20, 30].tolist() == [20, 30]

    write("data_batch_3", batch(7))
    with pytest.raises(SystemExit):
        r.load_cifar10(tmp_path)
    assert "cifar-10-python.tar.gz" in capsys.readouterr().err


def write_npz(folder, classes=40, per_file=44):
    """The downsampled ImageNet's files in small: an image's pixels hold its label, its row and its column."""
    folder.mkdir(parents=True)
    for i, name in enumerate(r.IMAGENET_FILES):
        labels = np.random.default_rng(i).permutation(np.arange(per_file) % classes) + 1
        images = np.zeros((per_file, 3, 32, 32), np.uint8)
        images[:, 0] = labels[:, None, None]
        images[:, 1], images[:, 2] = np.arange(32)[:, None], np.arange(32)
        np.savez(folder / name, data=images.reshape(per_file, 3072), labels=labels)


def test_imagenet32_is_read_from_npz_files(tmp_path):
    write_npz(tmp_path / "imagenet32")
    data = r.load_imagenet32(tmp_path)
    assert (data.x.dtype, data.x.shape, data.test_x.shape) == (torch.uint8, (440, 3, 32, 32), (44, 3, 32, 32))
    assert data.y.unique().tolist() == data.test_y.unique().tolist() == [*range(40)]
    for x, y in ((data.x, data.y), (data.test_x, data.test_y)):
        assert y.equal(y.sort().values)
        assert x[:, 0].eq(y[:, None, None] + 1).all()
        assert x[:, 1].eq(torch.arange(32)[:, None]).all()
        assert x[:, 2].eq(torch.arange(32)).all()
    tasks = r.split_tasks(data, 20)
    assert [task.y.unique().tolist() for task in tasks] == [[2 * k, 2 * k + 1] for k in range(20)]


def write_tree(folder, classes=20, per_class=3):
    """wnid folders of big JPEGs: the left half dark, the right half as bright as the class says."""
    for split in ("train", "val"):
        for c in range(classes):
            (folder / split / f"n{c:08d}").mkdir(parents=True)
            for i in range(per_class):
                pixels = np.zeros((200, 320, 3), np.uint8)
                pixels[:, 160:] = 10 * c + i
                Image.fromarray(pixels).save(folder / split / f"n{c:08d}" / f"image_{i}.JPEG", quality=95)


def test_imagenet32_is_made_once_from_a_tree_of_jpegs_and_goes_on_where_it_was_interrupted(
    tmp_path, monkeypatch
):
    write_tree(tmp_path / "imagenet32")
    shrink, read = r.shrink, []

    def interrupted(path):
        read.append(path)
        if len(read) > 30:
            raise KeyboardInterrupt
        return shrink(path)

    monkeypatch.setattr(r, "ThreadPool", lambda: contextlib.nullcontext(Inline()))
    monkeypatch.setattr(r, "shrink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        r.load_imagenet32(tmp_path)
    monkeypatch.undo()
    shrunk = tmp_path / "imagenet32/shrunk"
    made = {path: path.stat().st_mtime_ns for path in shrunk.glob("*.npz")}
    assert 1 <= len(made) <= 5  # of 11
    data = r.load_imagenet32(tmp_path)
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())
    assert sorted(p.name for p in shrunk.iterdir()) == sorted(r.IMAGENET_FILES)
    assert (data.x.shape, data.test_x.shape) == ((60, 3, 32, 32), (60, 3, 32, 32))
    for x, y in ((data.x, data.y), (data.test_x, data.test_y)):
        assert y.tolist() == [c for c in range(20) for _ in range(3)]
        right = x[:, :, :, 17:].float().mean((1, 2, 3)).view(20, 3)
        expected = 10.0 * torch.arange(20)[:, None] + torch.arange(3)
        torch.testing.assert_close(right.sort(1).values, expected, atol=2, rtol=0)
        assert x[:, :, :, :15].float().mean() < 2

    monkeypatch.setattr(r, "shrink_tree", None)  # is not called again
    assert r.load_imagenet32(tmp_path).x.equal(data.x)


class Inline:
    """A pool of no threads, so that an interrupt falls between two images."""

    def imap(self, function, items, chunksize):
        return map(function, items)


def test_shrinking_averages_over_each_pixels_area(tmp_path):
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255  # nearest or bilinear sampling would see stripes, the mean is grey
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert set(r.shrink(tmp_path / "stripes.png").tolist()) <= {127, 128}


# ---- the whole thing


def run_main(out, *argv):
    return r.main([*QUICK, "--out", str(out), *argv])


def test_a_run_from_the_command_line_leaves_its_results(tmp_path):
    command = [sys.executable, str(SCRIPT), *QUICK, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "AFID" in done.stdout
    assert all(
        "digits-classifier" in line
        for line in done.stdout.splitlines()
        if "FID of" in line or ", FID" in line
    )
    assert "task 5/5 rank1" in done.stderr

    result = json.loads((tmp_path / "out/result.json").read_text())
    assert [[v is not None for v in row] for row in result["fid"]] == [
        [k <= j for k in range(5)] for j in range(5)
    ]
    assert (result["afid"], result["forgetting"]) == r.afid_and_forgetting(result["fid"])
    assert (result["dataset"], result["method"], result["seed"]) == ("digits", "rank1", 0)
    assert set(result["seconds"]) == {"train", "sample", "fisher", "fid", "checkpoint"}
    assert result["config"]["epochs"] == 1
    assert len(result["fisher"]) == 4

    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert {line["task"] for line in log} == {1, 2, 3, 4, 5}
    assert all(line["distill"] > 0 for line in log if line["task"] > 1)
    assert max(line["ewc"] for line in log) > 0
    model = r.UNet(1, 10, (8,), layers_per_block=1)
    model.load_state_dict(torch.load(tmp_path / "out/model.pt", weights_only=True))
    for k in range(1, 6):
        picture = torchvision.io.decode_image(str(tmp_path / f"out/samples-task{k}.png"))
        assert picture.shape[1:] == (2 * k * 34 + 2, 10 * 34 + 2)
    assert (tmp_path / "out/fid.png").stat().st_size > 1000
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("method", [*r.TABLE_1, "rank4"])
def test_each_methods_row_does_what_its_name_says(tmp_path, monkeypatch, method):
    expected = {  # replay pools, tasks with a teacher in the loss, tasks with a penalty, Fishers
        "joint": (0, 0, 0, 0),
        "finetune": (0, 0, 0, 0),
        "replay": (4, 0, 0, 0),
        "gd": (4, 4, 0, 0),
        "diag-only": (0, 0, 4, 4),
        "rank1-only": (0, 0, 4, 4),
        "diag": (4, 4, 4, 4),
        "rank1": (4, 4, 4, 4),
        "rank4": (4, 4, 4, 4),
    }
    pools, seen = [], {}
    replay_pool, train_task = r.replay_pool, r.train_task

    def pool(*args):
        pools.append(args)
        return replay_pool(*args)

    def train(*args):
        _, task, _, _, _, _, teacher, held, _, y, pool, _, _ = args
        seen[task] = (teacher is not None, held is not None, pool is not None, y.unique().tolist())
        train_task(*args)

    monkeypatch.setattr(r, "replay_pool", pool)
    monkeypatch.setattr(r, "train_task", train)
    result = run_main(tmp_path, "--method", method)
    teachers, penalties, replayed, classes = zip(*seen.values())
    fishers = len(result["fisher"])
    assert (len(pools), sum(teachers), sum(penalties), fishers) == expected[method]
    assert sum(replayed) == len(pools)
    assert not (teachers[0] or penalties[0] or replayed[0])  # the first task has nothing to remember
    assert (result["lam"] > 0) == (fishers > 0)
    kept = {"trace"} if "diag" in method else {"energy", "eigenvalues" if "rank1" not in method else "c_star"}
    assert all(kept <= set(fisher) for fisher in result["fisher"])
    if method == "joint":
        assert classes == ([*range(10)],)
        assert (len(result["fid"]), result["fid"][0].count(None), result["forgetting"]) == (1, 0, None)
    else:
        assert classes == ([0, 1], [2, 3], [4, 5], [6, 7], [8, 9])
        assert [row.count(None) for row in result["fid"]] == [4, 3, 2, 1, 0]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (max(line["distill"] for line in log) > 0) == (expected[method][1] > 0)
    assert (max(line["ewc"] for line in log) > 0) == (expected[method][2] > 0)


def test_the_same_seed_gives_the_same_result_and_another_seed_another(tmp_path):
    first, again, other = (
        json.loads(json.dumps(run_main(tmp_path / str(i), "--seed", seed, "--dropout", "0.1")))
        for i, seed in enumerate(("1", "1", "2"))
    )
    for result in (first, again, other):
        del result["seconds"], result["peak_mb"]
    assert first == again
    assert first["fid"] != other["fid"]


def test_rank1_without_a_penalty_is_gd_to_the_last_digit(tmp_path):
    # lambda 0 is the baseline, and the Fisher's random draws change nobody else's.
    assert run_main(tmp_path / "a", "--lam", "0")["fid"] == run_main(tmp_path / "b", "--method", "gd")["fid"]


@pytest.mark.parametrize("method", ["gd", "rank1"])
def test_the_promised_time_counts_the_networks_real_passes(capsys, tmp_path, monkeypatch, method):
    real_forward, counted = r.UNet.forward, [0]

    def count(self, x, t, y):
        counted[0] += len(x) * (3 if torch.is_grad_enabled() else 1)
        return real_forward(self, x, t, y)

    promised = []
    passes_of_a_run = r.passes_of_a_run
    monkeypatch.setattr(r, "passes_of_a_run", lambda *a: promised.append(passes_of_a_run(*a)) or promised[0])
    monkeypatch.setattr(r.UNet, "forward", count)
    run_main(tmp_path, "--epochs", "11", "--method", method)
    assert "At this rate the whole run takes about" in capsys.readouterr().out
    pictures = 2 * 10 * 10 * 5  # DDIM steps x images a class x classes x tasks: too few to promise
    forward_mode = 4 * 200 * 2 * (method == "rank1")  # done without a graph, counted as 1, costs about 3
    assert counted[0] - pictures + forward_mode == pytest.approx(promised[0].total(), rel=0.15)


def test_needs_are_computed_from_the_networks_passes_and_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(r, "SIZES", {"digits": r.SIZES["digits"]})
    monkeypatch.setattr(r, "passes_per_second", lambda *_: 1000.0)
    r.main(["--needs", str(tmp_path / "new/needs.json")])
    digits = json.loads((tmp_path / "new/needs.json").read_text())["digits"]
    data = r.load_digits(Path())
    assert r.SIZES["digits"] == (*data.x.shape[1:3], 10, len(data.x), len(data.test_x))
    passes = 270 * len(data.x) * 3 + 20 * len(
        data.test_x
    )  # all images 270 times, there and back; FID samples
    assert digits["hours"]["joint"] == pytest.approx(passes / 1000 / 3600, abs=0.005)
    replay = (
        20 * 200 * sum(2 * k for k in range(100))
    )  # DDIM steps x images a class x old classes of each task
    assert digits["hours_of_tasks"]["100"]["replay"] == pytest.approx(replay / 1000 / 3600, abs=0.5)
    weights = sum(p.numel() for p in r.UNet(1, 10, (16, 32), 1).parameters())
    assert digits["gb_checkpoint"]["rank1"] == pytest.approx(8 * 4e-9 * weights, abs=0.001)


@pytest.mark.parametrize(
    "target", ["lambda", "rank-k", "decoupled", "regime", "mu", "teacher", "pool", "bf16", "curvature"]
)
def test_make_n_shows_a_studys_runs_named_by_their_flags_and_their_comparison(target):
    command = ["make", "-n", "-o", ".venv/installed", target, "SEEDS=3", "RUNS=there"]
    lines = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=True).stdout
    cfgs = [r.parse_args(shlex.split(line)[2:]) for line in lines.splitlines() if "rank1_ewc.py" in line]
    runs = [cfg for cfg in cfgs if not cfg.compare]
    comparisons = [cfg for cfg in cfgs if cfg.compare]
    assert {folder for cfg in comparisons for folder in cfg.compare} == {cfg.out for cfg in runs}
    assert {cfg.seed for cfg in runs} == {3}
    assert all(str(cfg.to).startswith("results/") for cfg in comparisons)
    for cfg in runs:
        for name, value in (f"{flag}=True".split("=")[:2] for flag in cfg.out.name.split("+")[1:]):
            found = getattr(cfg, name.replace("-", "_"))
            assert found == ([*map(int, value.split(","))] if name == "channels" else type(found)(value))


@pytest.mark.parametrize("target", ["digits", "mnist", "fashion", "cifar10", "imagenet"])
def test_make_n_shows_plain_commands_that_can_be_pasted(target):
    narrowed = ["METHODS=gd rank1-only", "SEEDS=3 4", "EXTRA=--epochs 5", "RUNS=there", "DATA=here"]
    command = ["make", "-n", "-o", ".venv/installed", target, *narrowed]
    lines = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=True).stdout
    *runs, last = [shlex.split(line) for line in lines.splitlines() if "rank1_ewc.py" in line]
    cfgs = [r.parse_args(run[2:]) for run in runs]
    found = {(c.dataset, c.method, c.seed, c.epochs, str(c.data_dir), str(c.out)) for c in cfgs}
    dataset = "imagenet32" if target == "imagenet" else target
    assert found == {
        (dataset, m, s, 5, "here", f"there/{dataset}/{m}-seed{s}")
        for m in ("gd", "rank1-only")
        for s in (3, 4)
    }
    assert last[2:] == ["--report", f"there/{dataset}"]


def test_an_unfinished_file_never_takes_the_place_of_a_whole_one(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), r.whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("result.json", "old")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_the_cpu_find_the_same_mu_and_c_star():
    model, (images, labels) = small_unet(), small_images(64)
    draws = list(r.fisher_draws(images, labels, 64, 16, generator()))
    found = []
    for device in ("cpu", "cuda"):
        on_device = copy.deepcopy(model).to(device)
        found.append(r.rank1_fisher(on_device, lambda d=device: ([v.to(d) for v in draw] for draw in draws)))
    (mu, c_star), (mu_cuda, c_star_cuda) = found
    torch.testing.assert_close(mu, mu_cuda.cpu(), atol=1e-2 * float(mu.abs().max()), rtol=0)
    torch.testing.assert_close(c_star, c_star_cuda.cpu(), rtol=1e-2, atol=0)


# ---- what the paper leaves open


def test_curvature_chooses_the_lambda_that_adds_it_along_the_first_mu(tmp_path, monkeypatch):
    result = run_main(tmp_path / "whole", "--curvature", "5")
    assert r.curvatures(result)[0] == pytest.approx(5)
    penalty, u = r.LowRankPenalty(result["lam"]), torch.tensor([3.0, 4.0]) / 5
    c_star, mu_norm = (result["fisher"][0][key] for key in ("c_star", "mu_norm"))
    penalty.add(rank1(mu_norm * u, c_star), torch.zeros(2))
    assert 2 * float(penalty.start(torch.zeros(2))(u)) == pytest.approx(5, rel=1e-4)  # u's second derivative
    with monkeypatch.context() as patch:
        patch.setattr(r, "losses", raises_at_call(8, r.losses, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path / "stopped", "--curvature", "5")
    run_main(tmp_path / "stopped", "--curvature", "5")
    assert same_but_for_the_seconds(tmp_path / "stopped", tmp_path / "whole")


def test_a_stiff_proximal_step_keeps_the_weights_where_the_old_tasks_want_them(tmp_path, monkeypatch):
    def distances(lam):  # |mu^T (theta - theta*)| after each task, for all the tasks before
        found, add = [], r.LowRankPenalty.add

        def spy(self, fisher, theta_star):
            found.extend(self.residual(theta_star).abs().tolist() if self.b else [])
            add(self, fisher, theta_star)

        with monkeypatch.context() as patch:
            patch.setattr(r.LowRankPenalty, "add", spy)
            run_main(tmp_path / lam, "--form", "proximal", "--lam", lam)
        return found

    stiff, loose = distances("1e7"), distances("1e-7")
    assert len(stiff) == len(loose) == 1 + 2 + 3
    assert max(stiff) < 1e-2 * max(loose)


def test_the_ema_teacher_is_the_average_of_the_weights_after_each_step(tmp_path, monkeypatch):
    weights, teachers, losses, replay_pool = [], [], r.losses, r.replay_pool

    def spy_losses(student, *args):
        weights.append(r.flat(student.parameters()).clone())
        return losses(student, *args)

    def spy_pool(teacher, *args):
        teachers.append((len(weights), r.flat(teacher.parameters()).clone()))
        return replay_pool(teacher, *args)

    monkeypatch.setattr(r, "losses", spy_losses)
    monkeypatch.setattr(r, "replay_pool", spy_pool)
    run_main(tmp_path, "--method", "gd", "--ema", "0.5")
    steps, teacher = teachers[0]
    average = weights[1]  # before a step are the weights after the one before it
    for after in weights[2 : steps + 1]:
        average = 0.5 * average + 0.5 * after
    torch.testing.assert_close(teacher, average)
    assert not torch.allclose(teacher, weights[steps])


def test_fisher_from_takes_the_fishers_samples_from_the_noisier_timesteps(tmp_path, monkeypatch):
    seen, fisher_draws = [], r.fisher_draws

    def spy(*args):
        for draw in fisher_draws(*args):
            seen.append(draw[1])
            yield draw

    monkeypatch.setattr(r, "fisher_draws", spy)
    run_main(tmp_path, "--fisher-from", "900")
    t = torch.cat(seen)
    assert (len(t), t.min() >= 900, t.max() > 990) == (2 * 4 * 200, True, True)


def test_a_comparison_has_the_means_over_the_seeds_and_the_ratio_to_gd(tmp_path, capsys):
    for seed, afid in enumerate((20.0, 26.0)):
        hand_made_run(tmp_path / f"gd{seed}", "gd", seed, afid, 2.0)
        for lam in (10.0, 1000.0):
            fisher = [{"c_star": 4.0, "mu_norm": 0.5, "energy": 1.0}]
            values = (tmp_path / f"rank1-{lam}-{seed}", "rank1", seed, afid * (1 + lam / 1000), 4.0)
            hand_made_run(*values, fisher=fisher, lam=lam)
    r.main(
        ["--compare", *map(str, tmp_path.iterdir()), "--over", "lam", "--to", str(tmp_path / "new/lambda")]
    )
    found = json.loads((tmp_path / "new/lambda.json").read_text())
    rows = {(row["line"], row["lam"]): row for row in found["rows"]}
    assert set(rows) == {("gd", 0), ("rank1", 10), ("rank1", 1000)}
    afid = rows["gd", 0]["AFID"]
    assert (afid["mean"], afid["error"], *sorted(afid["each"])) == pytest.approx((23, 3, 20, 26))
    assert rows["rank1", 1000]["AFID / gd's"]["each"] == pytest.approx([2, 2])
    assert rows["rank1", 1000]["curvature, task 1"]["mean"] == 1000
    assert sorted(rows["rank1", 10]["seeds"]) == [0, 1]
    assert "46.0 ± 6.0" in capsys.readouterr().out
    assert torchvision.io.decode_image(str(tmp_path / "new/lambda.png")).float().std() > 1


def test_a_comparison_over_the_curvature_refuses_several_runs_that_have_none(tmp_path, capsys):
    for lam in (10.0, 100.0):
        hand_made_run(tmp_path / str(lam), "diag", 0, 20.0, 2.0, lam=lam)
    error = refusal(capsys, "--compare", *tmp_path.iterdir(), "--over", "curvature", "--to", tmp_path / "new")
    assert "diag" in error
    assert "curvature" in error


def test_a_comparison_draws_a_line_for_each_other_setting_that_differs(tmp_path):
    for pool in (10, 50):
        for ema in (None, 0.9):
            hand_made_run(tmp_path / f"{pool}{ema}", "gd", 0, 20.0, 2.0, replay_per_class=pool, ema=ema)
    r.main(
        [
            "--compare",
            *map(str, tmp_path.iterdir()),
            "--over",
            "replay_per_class",
            "--to",
            str(tmp_path / "c"),
        ]
    )
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    lines = {(row["line"], row["replay_per_class"]) for row in rows}
    assert lines == {(line, pool) for line in ("gd", "gd, ema 0.9") for pool in (10, 50)}


@pytest.mark.parametrize("figure", r.FIGURES)
def test_a_figure_is_painted_of_a_model_that_is_trained_first(tmp_path, monkeypatch, figure):
    for name, value in {
        "TIMES": (100, 700),
        "EDGES": (0, 400, 1000),
        "GRADIENTS": 20,
        "VAE_STEPS": (0, 5),
    }.items():
        monkeypatch.setattr(r, name, value)
    run_main(tmp_path / "run", "--figure", figure, "--to", str(tmp_path / "new/figure"))
    found = json.loads((tmp_path / "new/figure.json").read_text())
    assert (found["samples"], found["config"]["method"], found["config"]["channels"]) == (20, "joint", [8])
    if figure == "1":
        assert [*map(len, (found["mse"], found["high noise"], found["low noise"]))] == [2, 2, 2]
    if figure == "2":
        assert np.array(found["cos"]).shape == (2, 20)
        assert found["mean"] == pytest.approx(np.array(found["cos"]).mean(1).tolist(), abs=1e-4)
    if figure == "3":
        assert np.array(found["cos_mu"]).diagonal() == pytest.approx([1, 1], abs=1e-5)
        assert len(found["at"]) == len(found["ratio"]) == 2
        assert found["all timesteps"]["c_star"] >= 1
    if figure == "vae":
        assert {name: len(v) for name, v in found.items() if name[:3] in ("VAE", "DDP")} == {
            "VAE, KL x 1": 2,
            "VAE, KL x 0.001": 2,
            "DDPM, all t": 1,
            "DDPM, t = 100": 1,
            "DDPM, t = 700": 1,
        }
        untrained, (first, last) = found["VAE, KL x 1"][0], found["VAE, KL x 0.001"]
        assert untrained["mse"] == first["mse"] > last["mse"]  # the same initial weights; it learns
    assert torchvision.io.decode_image(str(tmp_path / "new/figure.png")).float().std() > 1


def test_a_figure_of_any_finished_run_takes_its_settings_and_changes_nothing_there(tmp_path, uninterrupted):
    before = contents(uninterrupted)
    r.main(["--figure", "1", "--out", str(uninterrupted), "--to", str(tmp_path / "figure")])
    config = json.loads((tmp_path / "figure.json").read_text())["config"]
    assert (config["method"], config["channels"]) == ("rank1", [8])
    assert contents(uninterrupted) == before


def test_figure_1_of_the_best_denoiser_lies_between_the_two_limits_of_proposition_1():
    grey = torch.tensor([[40, 120], [150, 230]], dtype=torch.uint8)  # two classes, of two images each
    y = torch.arange(2).repeat_interleave(20)
    images = grey[:, torch.arange(20) % 2].flatten()[:, None, None, None].expand(-1, 1, 4, 4)

    class Best(torch.nn.Module):  # E[x_0 | x_t, y], the mean of the class's images by their likelihood
        def forward(self, x_t, t, y):
            abar = r.alphas_cumprod(CPU)[t][:, None]
            known, x = r.to_float(grey[y]), x_t.flatten(1)  # (B, 2), (B, 16)
            distance = (x[:, None] - abar[..., None].sqrt() * known[..., None]).square().sum(2)
            x0 = ((-distance / (2 * (1 - abar))).softmax(1) * known).sum(1, keepdim=True)
            return ((x - abar.sqrt() * x0) / (1 - abar).sqrt()).view_as(x_t)

    def draws(first, end):
        return r.fisher_draws(images, y, 400, 16, generator(), (first, end))

    found, _ = r.figure_1(Best(), draws, r.Data(images, y, images, y))
    abar, known = r.alphas_cumprod(CPU)[list(found["t"])], r.to_float(grey)
    assert found["low noise"] == pytest.approx((abar * known.square().mean()).tolist(), rel=1e-4)
    assert found["high noise"] == pytest.approx((abar * known.mean(1).square().mean()).tolist(), rel=1e-4)
    assert found["mse"][0] == pytest.approx(found["low noise"][0], rel=1e-3)
    assert found["mse"][-3:] == pytest.approx(found["high noise"][-3:], rel=0.02)


def test_a_vaes_loss_is_squared_error_and_weighted_divergence_from_a_normal_distribution():
    vae, x = r.VAE(12), torch.randn(5, 12, generator=generator())
    eps, theta = torch.randn(5, 8, generator=generator(1)), dict(vae.named_parameters())
    image, mean, log_var = vae(x, eps)
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = (image - x).square().mean(1) + 0.3 * kl
    torch.testing.assert_close(r.vae_losses(0.3, vae, (x, eps), theta), expected)


def test_small_is_a_row_of_settings_that_flags_still_change_in_a_folder_of_its_own():
    cfg = r.parse_args(["--dataset", "fashion", "--small", "--epochs", "3"])
    assert (cfg.channels, cfg.epochs, str(cfg.out)) == ([16, 32, 32, 32], 3, "runs-small/fashion/rank1-seed0")
    assert r.parse_args(["--figure", "1", "--dataset", "mnist"]).out == Path("runs-small/mnist/joint-seed0")
    assert r.parse_args(["--dataset", "fashion"]).epochs == 200
    assert r.parse_args(["--small"]).epochs == r.parse_args([]).epochs  # the digits are small


# ---- runs that survive

LONGER = ["--epochs=2", "--dropout=0.1", "--checkpoint-epochs=1"]
DIES = """
import os, signal, sys, torch
torch.set_num_threads(1)
import rank1_ewc as r

what, nth = sys.argv[1], int(sys.argv[2])
module = torch if what == "save" else r
real, calls = getattr(module, what), [0]

def dies_at_the_nth_call(*args):
    calls[0] += 1
    if calls[0] < nth or os.environ.get("RANK", "1") != "1":  # of several processes, the second dies
        return real(*args)
    if what == "save":
        real(*args)
        os.truncate(args[1], args[1].stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, what, dies_at_the_nth_call)
r.main(sys.argv[3:])
"""


def run_once(tmp_path_factory, *argv):
    """The folder of a run that several tests compare theirs with."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r, "CACHE", tmp_path_factory.getbasetemp() / "rank1_ewc")
        run_main(folder, *argv)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_once(tmp_path_factory, *LONGER)


def same_but_for_the_seconds(folder, other):
    results = [json.loads((f / "result.json").read_text()) for f in (folder, other)]
    for result in results:
        del result["seconds"], result["peak_mb"]
    logs = [(f / "log.jsonl").read_text() for f in (folder, other)]
    weights = [torch.load(f / "model.pt", weights_only=True) for f in (folder, other)]
    equal = [torch.equal(weights[0][name], weights[1][name]) for name in weights[1]]
    return results[0] == results[1] and logs[0] == logs[1] and len(equal) == len(weights[0]) and all(equal)


def test_a_run_killed_while_it_writes_a_checkpoint_and_started_again_ends_the_same(tmp_path, uninterrupted):
    argv = [*QUICK, *LONGER, "--out", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", DIES, "save", "8", *argv], cwd=SCRIPT.parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    r.main(argv)
    assert same_but_for_the_seconds(tmp_path, uninterrupted)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("what", "nth"),
    [
        ("losses", 2),  # in the first epoch of all
        ("describe_fisher", 2),  # between training and measuring
        ("frechet_distance", 7),  # while measuring after the second task
        ("replay_pool", 3),  # between two tasks
        ("plot_fid", 1),  # when all is done but the result
    ],
)
def test_a_run_interrupted_at_any_moment_ends_the_same(tmp_path, uninterrupted, monkeypatch, what, nth):
    with monkeypatch.context() as patch:
        patch.setattr(r, what, raises_at_call(nth, getattr(r, what), KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path, *LONGER)
    assert not (tmp_path / "result.json").exists()
    run_main(tmp_path, *LONGER)
    assert same_but_for_the_seconds(tmp_path, uninterrupted)


def test_a_run_killed_again_and_again_ends_the_same(tmp_path, uninterrupted):
    for _ in range(2):  # each time it comes six steps further, and is killed in the seventh
        command = [sys.executable, "-c", DIES, "losses", "9", *QUICK, *LONGER, "--out", str(tmp_path)]
        assert subprocess.run(command, cwd=SCRIPT.parent, check=False).returncode == -signal.SIGKILL
    run_main(tmp_path, *LONGER)
    assert same_but_for_the_seconds(tmp_path, uninterrupted)


def raises_at_call(nth, function, error):
    calls = []

    def wrapped(*args):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return function(*args)

    return wrapped


@pytest.mark.parametrize(
    ("method", "nth"), [("joint", 20), ("gd", 15), ("diag", 20), ("rank1 --form=proximal --ema=0.9", 15)]
)
def test_every_methods_run_goes_on_also_from_an_older_checkpoint(tmp_path, monkeypatch, method, nth):
    argv = ["--method", *method.split(), "--epochs=3", "--lr-decay=linear", "--checkpoint-epochs=2"]
    run_main(tmp_path / "whole", *argv)
    with monkeypatch.context() as patch:
        patch.setattr(r, "losses", raises_at_call(nth, r.losses, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path / "stopped", *argv)
    run_main(tmp_path / "stopped", *argv, "--checkpoint-epochs=1")  # may change: it changes no number
    assert same_but_for_the_seconds(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_goes_on_after_an_interrupt(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(r, "losses", raises_at_call(17, r.losses, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path, *LONGER, "--device", "cuda")
    assert len(run_main(tmp_path, *LONGER, "--device", "cuda")["fid"]) == 5


# ---- more than one process, and a batch in turns


SHARED = ["--epochs=2", "--checkpoint-epochs=1"]  # no dropout: it is drawn anew by each process


def two_processes(*command):
    """torchrun's exit status and what it printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*torchrun, *map(str, command)], cwd=SCRIPT.parent, **pipes) as process:
        try:
            printed = process.communicate(timeout=200)[0]
        finally:
            process.terminate()  # of one that hangs: it ends its processes
    return process.returncode, printed


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory):
    return run_once(tmp_path_factory, *SHARED)


def log_and_result(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, json.loads((folder / "result.json").read_text())


def test_two_processes_that_take_their_batches_in_turns_learn_what_one_learns(tmp_path, by_one_process):
    argv = [*QUICK, *SHARED, "--accumulate=2", "--fresh", "--out", tmp_path]
    status, printed = two_processes(SCRIPT, *argv)
    assert status == 0
    assert printed.count("AFID") == 2  # the table's, by rank 0 alone
    (ours, two), (theirs, one) = log_and_result(tmp_path), log_and_result(by_one_process)
    assert (two["processes"], one["processes"]) == (2, 1)
    assert [(v["task"], v["step"]) for v in ours] == [(v["task"], v["step"]) for v in theirs]
    until = next(i for i, v in enumerate(theirs) if v["task"] == 2)  # the first step with replay and teacher
    for part in ("denoise", "distill", "ewc"):
        expected = pytest.approx([v[part] for v in theirs[: until + 1]], abs=1e-5)
        assert [v[part] for v in ours[: until + 1]] == expected
    a, b = (
        torch.load(f / "checkpoint.pt", weights_only=True)["penalty"]["a"][0]
        for f in (tmp_path, by_one_process)
    )
    torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)  # sqrt(c*) mu of task 1
    assert two["fisher"][0]["c_star"] == pytest.approx(one["fisher"][0]["c_star"], rel=1e-5)
    assert two["fid_real"] == pytest.approx(one["fid_real"])
    assert two["afid"] == pytest.approx(one["afid"], rel=1e-2)
    assert contents(tmp_path).keys() == contents(by_one_process).keys()


def test_a_run_of_two_processes_of_which_one_died_ends_with_an_error_and_one_process_finishes_it(
    tmp_path, capsys
):
    argv = ["--form=proximal", "--ema=0.9", "--curvature=5", *SHARED]
    run_main(tmp_path / "whole", *argv)
    died = ["-c", DIES, "losses", "9", *QUICK, *argv, "--out", tmp_path]  # in task 2
    status, _ = two_processes("--no-python", sys.executable, *died)
    assert status != 0
    assert not (tmp_path / "result.json").exists()
    capsys.readouterr()
    run_main(tmp_path, *argv)
    assert "going on in task 2/5" in capsys.readouterr().out
    (ours, result), (theirs, expected) = log_and_result(tmp_path), log_and_result(tmp_path / "whole")
    assert len(ours) == len(theirs)
    assert ours[-1]["denoise"] == pytest.approx(theirs[-1]["denoise"], rel=1e-2)
    assert result["afid"] == pytest.approx(expected["afid"], rel=1e-2)


def test_the_parts_of_a_batch_add_up_to_its_losses_and_its_gradient():
    student, teacher = small_unet(seed=0).eval(), small_unet(seed=1).eval()
    x0, y = r.to_float(small_images(11)[0]), torch.arange(11) % 10
    draw = x0, *r.draw_noise(x0, generator()), y

    def gradient(parts):
        found = [r.losses(student, teacher, draw, 6, part) for part in parts]
        student.zero_grad()
        for part in found:
            sum(part).backward()
        return torch.tensor([[v.item() for v in part] for part in found]).sum(0), r.flat(
            p.grad for p in student.parameters()
        )

    for ours, whole in zip(gradient([slice(i, None, 3) for i in range(3)]), gradient([slice(None)])):
        torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-5)


def test_each_process_paints_its_share_of_the_samples(monkeypatch):
    model, y = small_unet(), torch.arange(10).repeat_interleave(25)  # 250: two batches of 100, one of 50

    def paint():
        return r.sample_images(model, (1, 8, 8), y, 2, generator(), "")

    whole = paint()
    monkeypatch.setattr(r, "WORLD", 3)
    monkeypatch.setattr(r, "all_sum", lambda v: v)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(r, "RANK", rank)
        shares.append(paint())
    assert torch.equal(sum(shares), whole)
    assert all(share.any() and not torch.equal(share, whole) for share in shares)


@pytest.mark.parametrize("flag", ["--report", "--compare", "--needs", "--figure=1"])
def test_torchrun_is_refused_for_what_trains_nothing(tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setattr(r, "WORLD", 2)
    assert "torchrun" in refusal(capsys, flag, *([] if "=" in flag else [tmp_path]))


def test_processes_on_several_machines_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(r, "WORLD", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "several machines" in refusal(capsys, *QUICK, "--out", tmp_path)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_processes_talk_through_gloo_on_cpus_and_nccl_on_gpus(tmp_path, monkeypatch, cuda):
    def started(backend, **_):
        raise KeyboardInterrupt(backend)

    monkeypatch.setattr(r, "WORLD", 2)
    monkeypatch.setattr(r, "find_device", lambda _: torch.device("cuda" if cuda else "cpu"))
    monkeypatch.setattr(r.dist, "init_process_group", started)
    with pytest.raises(SystemExit) as stopped:
        run_main(tmp_path)
    assert str(stopped.value.__context__) == ("cpu:gloo,cuda:nccl" if cuda else "gloo")


def test_processes_that_do_not_see_the_same_files_are_stopped(capsys, monkeypatch):
    monkeypatch.setattr(r, "WORLD", 2)
    monkeypatch.setattr(r, "all_sum", lambda v: v + torch.tensor([1.0, 3.0]))  # what the other has found
    r.same_for_all(1, 3)
    with pytest.raises(SystemExit):
        r.same_for_all(1, 4)
    assert "same files" in capsys.readouterr().err


def test_a_batch_too_small_for_its_parts_is_refused(tmp_path, capsys):
    assert "--accumulate 65" in refusal(capsys, *QUICK, "--accumulate=65", "--out", tmp_path)


# ---- what makes it fast


def test_compiled_is_the_same_run_and_nothing_is_compiled_again_after_the_second_task_began(
    tmp_path, monkeypatch
):
    graphs, train_task = [], r.train_task

    def train(*args):
        train_task(*args)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    argv = ["--replay-per-class=20"]  # fewer than 16 images at once are a case of their own
    run_main(tmp_path / "eager", *argv)
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # all but the last stage
    monkeypatch.setattr(r, "train_task", train)
    run_main(tmp_path / "compiled", *argv, "--compile")
    (ours, result), (theirs, expected) = (log_and_result(tmp_path / f) for f in ("compiled", "eager"))
    assert 0 < graphs[0] < graphs[1] == graphs[-1]
    assert ours[-1]["denoise"] == pytest.approx(theirs[-1]["denoise"], rel=1e-3)
    assert result["afid"] == pytest.approx(expected["afid"], rel=1e-3)


def test_without_a_compiler_the_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    assert len(run_main(tmp_path, "--compile")["fid"]) == 5
    assert "note: torch.compile does not work here" in capsys.readouterr().out


def test_bf16_trains_and_samples_in_bfloat16_and_keeps_weights_and_fisher_in_float32(tmp_path, monkeypatch):
    seen, forward = set(), r.UNet.forward

    def spy(model, x, t, y):
        out = forward(model, x, t, y)
        seen.add((model.training, torch._C._functorch.maybe_current_level() is not None, out.dtype))
        return out

    monkeypatch.setattr(r.UNet, "forward", spy)
    result = run_main(tmp_path, "--bf16", "--method=diag")
    assert all(math.isfinite(v) for v in result["afid"])
    assert (True, False, torch.bfloat16) in seen
    assert (False, False, torch.bfloat16) in seen
    assert {dtype for _, derivative, dtype in seen if derivative} == {torch.float32}
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {v.dtype for v in weights.values()} == {torch.float32}


def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, uninterrupted, monkeypatch, capsys):
    monkeypatch.setattr(r, "losses", raises_at_call(11, r.losses, KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        run_main(tmp_path, *LONGER, "--fresh")
    assert stopped.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rank1_ewc: interrupted")
    assert "--fresh" not in last  # which would begin again
    assert sys.executable in last
    r.main(shlex.split(last.split(": ")[-1])[2:])
    assert same_but_for_the_seconds(tmp_path, uninterrupted)


def test_a_finished_run_given_again_prints_its_result_and_does_nothing(tmp_path, monkeypatch, capsys):
    run_main(tmp_path)
    before, table = contents(tmp_path), capsys.readouterr().out.split("digits, rank1:")[1]
    monkeypatch.setitem(r.LOADERS, "digits", None)  # not even the data is read
    run_main(tmp_path)
    assert table.split("(lower")[0] in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_fresh_starts_over_and_an_old_result_does_not_outlive_it(tmp_path, monkeypatch):
    first = run_main(tmp_path, "--seed", "1")
    monkeypatch.setattr(r, "losses", raises_at_call(11, r.losses, KeyboardInterrupt))
    with pytest.raises(SystemExit):
        run_main(tmp_path, "--seed", "2", "--fresh")
    assert not (tmp_path / "result.json").exists()
    second = run_main(tmp_path, "--seed", "2")
    assert (first["seed"], second["seed"]) == (1, 2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_of_other_settings_is_refused_naming_the_setting_and_nothing_is_touched(
    tmp_path, monkeypatch, capsys
):
    run_main(tmp_path / "finished")
    monkeypatch.setattr(r, "losses", raises_at_call(11, r.losses, KeyboardInterrupt))
    with pytest.raises(SystemExit):
        run_main(tmp_path / "stopped")
    capsys.readouterr()
    for name, file in (("finished", "result.json"), ("stopped", "checkpoint.pt")):
        before = contents(tmp_path / name)
        for flag, words in (("--lam=11", "--lam 10.0 11.0"), ("--channels=16", "--channels [8] [16]")):
            error = refusal(capsys, *QUICK, flag, "--out", tmp_path / name)
            assert all(word in error for word in [*words.split(), str(tmp_path / name / file), "--fresh"])
        assert contents(tmp_path / name) == before


@pytest.mark.parametrize("file", ["checkpoint.pt", "result.json"])
@pytest.mark.parametrize("damage", [b"", b"{}", "half"])
def test_a_broken_checkpoint_or_result_is_refused_by_its_name_and_kept(
    tmp_path, uninterrupted, capsys, file, damage
):
    whole = (uninterrupted / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    before = contents(tmp_path)
    error = refusal(capsys, *QUICK, *LONGER, "--out", tmp_path)
    assert str(tmp_path / file) in error
    assert "--fresh" in error
    assert contents(tmp_path) == before


def test_a_checkpoint_holds_no_replay_images_and_is_read_without_pickles(uninterrupted):
    saved = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    assert (saved["task"], saved["epoch"]) == (4, 2)
    parts = {"settings", "task", "epoch", "model", "teacher", "average", "optimizer", "generators", "penalty"}
    assert set(saved) == parts | {"fid", "fisher", "log", "seconds", "peak_mb"}
    assert len(saved["penalty"]["b"]) == 4


# ---- the report


def hand_made_run(folder, method, seed, afid, forgetting, fisher=(), **config):
    """A result.json of two tasks as the script writes it, of no real run."""
    joint = method == "joint"
    fid = [[afid, afid]] if joint else [[5.0, None], [afid + forgetting, afid - forgetting]]
    config = {
        "dataset": "fashion",
        "method": method,
        "lam": 0.0,
        "seed": seed,
        "fid_features": "inception",
    } | config
    result = {
        **{key: config[key] for key in ("dataset", "method", "lam", "seed", "fid_features")},
        "fid": fid,
        "afid": [afid] if joint else [5.0, afid],
        "forgetting": None if joint else forgetting,
        "fid_real": [1.0, 1.0],
        "fisher": [*fisher],
        "config": config,
        "versions": {},
        "seconds": {},
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_the_report_has_means_errors_published_numbers_and_missing_cells(tmp_path, capsys):
    hand_made_run(tmp_path / "a", "gd", 0, 20.0, 2.0)
    hand_made_run(tmp_path / "b", "gd", 1, 26.0, 5.0)
    hand_made_run(tmp_path / "c", "joint", 0, 7.0, 0.0)
    fisher = [{"energy": 1.0}, {"energy": 2.0}]
    hand_made_run(tmp_path / "d", "rank1-only", 0, 60.0, 50.0, fisher=fisher, lam=10.0)
    r.main(["--report", str(tmp_path)])
    text = (tmp_path / "table1.md").read_text()
    assert text in capsys.readouterr().out
    cells = {
        row[1]: row
        for row in ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines())
        if row[1:]
    }
    assert cells["gd"] == ["fashion", "gd", "2", "23.0 ± 3.0", "3.5 ± 1.5", "-", "19.1 / 3.9", "inception"]
    assert cells["joint"] == ["fashion", "joint", "1", "7.0", "-", "-", "5.7 / -", "inception"]
    assert cells["rank1"] == ["fashion", "rank1", "0", "missing", "missing", "-", "15.4 / 0.9", "inception"]
    assert cells["rank1-only"][5:7] == ["15", "not known"]
    assert cells["replay"][6] == "not known"
    assert set(r.TABLE_1) < set(cells)
    assert "rank4" not in cells  # not the paper's: only where there are runs
    assert "missing, no finished run: mnist, cifar10, imagenet32" in text
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "table1.csv").read_text().splitlines())}
    assert [float(rows["gd"][key]) for key in ("AFID", "AFID s.e.", "forgetting")] == pytest.approx(
        [23, 3, 3.5]
    )
    for figure in ("figure4.png", "figure5-fashion.png"):
        assert torchvision.io.decode_image(str(tmp_path / figure)).float().std() > 1


def test_the_report_says_by_which_settings_a_run_is_not_the_papers(tmp_path, capsys):
    hand_made_run(tmp_path / "a", "gd", 0, 20.0, 2.0, epochs=3, batch_size=128)
    hand_made_run(tmp_path / "b", "rank1", 0, 20.0, 2.0, epochs=3, batch_size=128, lam=100.0)
    r.main(["--report", str(tmp_path)])
    note = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("- fashion"))
    assert "epochs 3 (paper 200)" in note
    assert "lam 100.0 (paper 15000.0)" in note
    assert "batch_size" not in note


def test_figure_4_draws_the_mean_over_the_seeds_and_its_standard_error(tmp_path, monkeypatch):
    for seed, afid in enumerate((20.0, 26.0)):
        hand_made_run(tmp_path / str(seed), "gd", seed, afid, 2.0)
    hand_made_run(tmp_path / "joint", "joint", 0, 7.0, 0.0)
    figures = {}
    monkeypatch.setattr(r, "save_figure", lambda figure, path: figures.update({path.name: figure}))
    r.main(["--report", str(tmp_path)])
    (axes,) = figures["figure4.png"].axes
    joint, gd = axes.get_lines()
    assert (list(joint.get_ydata()), list(gd.get_ydata())) == ([7, 7], [5, 23])
    band = axes.collections[1].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(26)
    assert band[band[:, 0] == 2, 1].min() == pytest.approx(20)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"method": "rank1", "seed": 0, "epochs": 2}, "--epochs 1 2"),
        ({"method": "gd", "seed": 1, "lam": 9.0}, "--lam 0.0 9.0"),
        ({"method": "gd", "seed": 0}, "same seed"),
    ],
)
def test_runs_that_do_not_belong_into_one_table_are_refused(tmp_path, capsys, other, words):
    hand_made_run(tmp_path / "a", "gd", 0, 20.0, 2.0, epochs=1)
    hand_made_run(tmp_path / "b", **({"afid": 20.0, "forgetting": 2.0, "epochs": 1} | other))
    error = refusal(capsys, "--report", tmp_path)
    assert all(word in error for word in [*words.split(), str(tmp_path / "a"), str(tmp_path / "b")])


def test_figure_5_shows_the_same_cut_of_every_runs_pictures(tmp_path):
    for i, method in enumerate(("gd", "rank1")):
        hand_made_run(tmp_path / method, method, 0, 20.0, 2.0)
        for k in (1, 2):
            grey = torch.full((2 * k * 10, 1, 8, 8), 60 * i + 100 + 30 * k, dtype=torch.uint8)
            r.save_samples(grey, tmp_path / method / f"samples-task{k}.png")
    r.main(["--report", str(tmp_path)])
    pixels = torchvision.io.decode_image(str(tmp_path / "figure5-fashion.png"))[0].flatten().bincount()
    assert all(pixels[grey] > 2000 for grey in (130, 160, 190, 220))


# ---- bad input: one line on stderr that says what to do, status 2, before any training


def refusal(capsys, *argv):
    """The one line that the command line is refused with."""
    with pytest.raises(SystemExit) as stopped:
        r.main([*map(str, argv)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dataset digit", "digits mnist fashion"),
        ("--method rank3", "gd diag rank1"),
        ("--fid vgg", "inception classifier"),
        ("--lam -1", "--lam 0 -1"),
        ("--lam nan", "--lam 0 nan"),
        ("--lam inf", "--lam inf"),
        ("--lam many", "--lam float many"),
        ("--epochs 0", "--epochs 1 0"),
        ("--epochs 1.5", "--epochs int 1.5"),
        ("--limit 0", "--limit 1 0"),
        ("--lr 0", "--lr above 0"),
        ("--dropout 1", "--dropout 0.99"),
        ("--sample-steps 1001", "--sample-steps 1000"),
        ("--channels 8,12", "--channels multiples of 8"),
        ("--channels 32;64", "--channels 32,64"),
        ("--channels 0", "--channels 1"),
        ("--channels 8,8,8,8,8", "--channels levels 8x8"),
        ("--channels 8,8,8,8", "--channels levels 8x8"),
        ("--device tpu", "--device auto cpu cuda"),
        ("--device cuda:99", "--device cuda:99 auto"),
        ("--seed -1", "--seed 0"),
        ("--frobnicate", "--frobnicate"),
        ("--compare nowhere", "nowhere result.json train"),
        ("--compare nowhere --over lambda", "--over lambda lam replay_per_class"),
        ("--lam 10 --curvature 3", "--curvature --lam"),
        ("--method diag --curvature 3", "--curvature rank"),
        ("--curvature 0", "--curvature above 0"),
        ("--method gd --form proximal", "--form proximal rank"),
        ("--method finetune --ema 0.9", "--ema teacher finetune"),
        ("--ema 1", "--ema 0.99999"),
        ("--figure 4", "--figure 1 2 3 vae"),
        ("--report nowhere", "nowhere make digits"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(capsys, argv, words):
    error = refusal(capsys, *argv.split())
    assert all(word in error for word in words.split())


def test_an_output_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "out") in refusal(capsys, "--out", tmp_path / "file" / "out")


def test_missing_data_without_a_network_is_refused_with_the_folder_and_the_files(
    capsys, tmp_path, no_network
):
    error = refusal(capsys, "--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "out")
    for words in (
        str(tmp_path / "MNIST/raw"),
        "train-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "--data-dir",
    ):
        assert words in error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("imagenet32", "imagenet32 train_data_batch_1.npz val_data.npz train/<wnid>/*.JPEG"),
    ],
)
def test_missing_cifar10_and_imagenet32_are_refused_with_what_to_put_where(
    capsys, tmp_path, no_network, name, words
):
    error = refusal(capsys, "--dataset", name, "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert all(word in error for word in [*words.split(), str(tmp_path), "--data-dir"])


def objects(n):
    return np.array([{} for _ in range(n)], dtype=object)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"data": np.zeros((44, 3072), np.uint8)}, "labels"),
        ({"data": np.zeros((44, 3000), np.uint8), "labels": np.arange(44) % 40 + 1}, "3000 3072"),
        ({"data": np.zeros((44, 3072)), "labels": np.arange(44) % 40 + 1}, "uint8"),
        ({"data": np.zeros((44, 3072), np.uint8), "labels": objects(44)}, "allow_pickle=False"),
        ({"data": np.zeros((44, 3072), np.uint8), "labels": np.arange(44) % 41 + 1}, "labels val_data"),
        (None, "damaged"),
    ],
)
def test_an_imagenet_file_of_another_form_is_refused_by_its_name(capsys, tmp_path, arrays, words):
    write_npz(tmp_path / "imagenet32")
    path = tmp_path / "imagenet32/train_data_batch_7.npz"
    np.savez(path, **arrays) if arrays else path.write_bytes(path.read_bytes()[:5000])
    error = refusal(capsys, "--dataset", "imagenet32", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert all(word in error for word in words.split())
    assert ("train_data_batch_7.npz" in error) or words == "labels val_data"


def test_a_damaged_jpeg_is_refused_by_its_name(capsys, tmp_path):
    write_tree(tmp_path / "imagenet32", classes=20, per_class=1)
    path = tmp_path / "imagenet32/val/n00000007/image_0.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SystemExit):
        r.load_imagenet32(tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]  # below the progress bar
    assert last.startswith(f"rank1_ewc: {path} is damaged")


def test_a_truncated_data_file_is_refused_by_its_name(capsys, tmp_path, no_network):
    write_idx(tmp_path / "FashionMNIST/raw")
    path = tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    error = refusal(capsys, "--dataset", "fashion", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert str(path) in error
    assert "7,840,016" in error


@pytest.mark.parametrize(
    ("file", "at", "to"), [("t10k-labels-idx1-ubyte", 9, 77), ("train-images-idx3-ubyte", 2, 1)]
)
def test_a_data_file_with_wrong_contents_is_refused(capsys, tmp_path, no_network, file, at, to):
    write_idx(tmp_path / "MNIST/raw")
    path = tmp_path / "MNIST/raw" / file
    contents = bytearray(path.read_bytes())
    contents[at] = to
    path.write_bytes(contents)
    error = refusal(capsys, "--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert "damaged" in error
    assert str(path.parent) in error


def test_inception_weights_that_cannot_be_fetched_are_refused_naming_the_classifier(
    capsys, tmp_path, no_network, monkeypatch
):
    monkeypatch.setattr(r.cleanfid.features.InceptionV3W, "__init__", no_weights)
    assert "--fid classifier" in refusal(capsys, "--fid", "inception", "--out", tmp_path)


def no_weights(*_, **__):
    raise URLError("no network")


def test_a_damaged_classifier_file_is_refused_by_its_name(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(r, "CACHE", tmp_path)
    r.classifier_features("digits", r.load_digits(tmp_path), CPU)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in refusal(capsys, *QUICK, "--out", tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_the_run_with_task_step_and_settings(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_main(tmp_path, "--lr", "1e12")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert all(words in error for words in ("task 1", "step 2", "--lr", "1e+12", "--lam"))


# ---- make bench: the plain ways, as the authors' code has them, against ours. Not a test: ratios of one run
# on one machine. On a CPU at the digits' size, on a GPU at the paper's.


def one_by_one(model, draws, use):
    """use(gradient in float64 (D,)) for every sample."""
    model.eval()
    for draw in draws():
        for i in range(len(draw[0])):
            loss = r.per_sample_loss(model, *(v[i : i + 1] for v in draw)).mean()
            use(r.flat(torch.autograd.grad(loss, model.parameters())).double())


def plain_rank1_fisher(model, draws):
    total, n = 0.0, 0

    def add(g):
        nonlocal total, n
        total, n = total + g, n + 1

    one_by_one(model, draws, add)
    mu, squares = total / n, []
    one_by_one(model, draws, lambda g: squares.append(float(mu @ g) ** 2))
    return mu, sum(squares) / n / float(mu @ mu) ** 2


def plain_diagonal_fisher(model, draws):
    squares = []

    def add(g):
        squares[:] = [g.square() + squares[0]] if squares else [g.square()]

    one_by_one(model, draws, add)
    return squares[0] / sum(len(draw[0]) for draw in draws())


def plain_training(cfg, model, teacher, x, y, pool, generators, steps):
    """Two passes of the student, real and replayed images, then these again beside the teacher; float32."""
    optimizer, found = torch.optim.Adam(model.parameters(), lr=cfg.lr), []
    shuffled = torch.randperm(len(x), generator=generators["order"], device=x.device)
    torch.randint(2**62, (), generator=generators["dropout"], device=x.device)
    for index in shuffled.split(cfg.batch_size)[:steps]:
        old = torch.randint(len(pool[0]), index.shape, generator=generators["replay"], device=x.device)
        images, labels = r.to_float(torch.cat([x[index], pool[0][old]])), torch.cat([y[index], pool[1][old]])
        t, eps = r.draw_noise(images, generators["noise"])
        denoise = (model(r.add_noise(images, t, eps), t, labels) - eps).square().mean()
        images, t, eps, labels = (v[len(index) :] for v in (images, t, eps, labels))
        x_t = r.add_noise(images, t, eps)
        with torch.no_grad():
            taught = teacher(x_t, t, labels)
        distill = (model(x_t, t, labels) - taught).square().mean()
        optimizer.zero_grad()
        (denoise + distill).backward()
        optimizer.step()
        found.append([denoise.item(), distill.item()])
    return np.mean(found[-r.LOG_EVERY :], 0)


def plain_penalty(lam, tasks, theta):
    """tasks: (mu, c*, theta*) of each, in float64."""
    return lam / 2 * sum(c * (mu @ (theta.double() - star)) ** 2 for mu, c, star in tasks)


def plain_frechet_distance(a, b):
    return cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


class PILImages(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = [Image.fromarray(image[0].numpy()) for image in images.cpu()]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torchvision.transforms.functional.to_tensor(self.images[i]) * 2 - 1


def peak_mb(device, work):
    """The memory (MB) that work() took at its most, beyond what was there before; None if not known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    kb = []
    try:  # Linux: what was freed goes back, and the peak begins anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        for name in ("VmRSS", "VmHWM"):
            kb.append(int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
            if name == "VmRSS":
                work()
    except (OSError, AttributeError):
        return None
    return (kb[1] - kb[0]) / 2**10


def timed(device, work):
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def difference(ours, plain):
    """The largest difference, as a share of the largest value; of several results the largest of these."""
    if isinstance(plain, tuple):
        return max(map(difference, ours, plain))
    ours, plain = (torch.as_tensor(v).double().flatten().cpu() for v in (ours, plain))
    return float((ours - plain).abs().max() / plain.abs().max())


def compare_ways(device, work, at_least, same_to, plain, ours, memory=None, repeat=5):
    """Both ways, turn about: the ratio of the medians. A first call of each, to warm up, is not counted."""
    results = [timed(device, way)[1] for way in (plain, ours)]
    memory = memory or [peak_mb(device, way) for way in (plain, ours)]
    seconds = [[timed(device, way)[0] for way in (plain, ours)] for _ in range(repeat)]
    plain_s, ours_s = np.median(seconds, 0).tolist()
    found = {
        "work": work,
        "plain s": plain_s,
        "ours s": ours_s,
        "ratio": plain_s / ours_s,
        "at least": at_least,
    }
    found |= {"plain MB": memory[0], "ours MB": memory[1], "difference": difference(*results[::-1])}
    fast, same = not at_least or found["ratio"] >= at_least, not same_to or found["difference"] <= same_to
    return found | {"same to": same_to, "passed": fast and same}


def bench_ways(cfg, device):
    """(work, at least this ratio on a CPU, on a GPU, the same to, the plain way, ours); ways give results."""
    cuda = device.type == "cuda"
    channels, size, classes, *_ = r.SIZES[cfg.dataset]
    shape, models = (channels, size, size), {}
    for seed, who in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        models[who] = r.UNet(channels, classes, cfg.channels, cfg.layers_per_block, 0.0).to(device)
        models[f"fast {who}"] = copy.deepcopy(models[who])
        if r.speedup(cfg, "compile", device) and r.can_compile(cfg, models[who], shape, device):
            models[f"fast {who}"].compile()
    for who in ("teacher", "fast teacher"):
        models[who].eval().requires_grad_(False)
    steps, batch, old = 20, cfg.batch_size, classes - classes // cfg.tasks
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (steps * batch, *shape), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(classes, (len(images),), generator=generator).to(device)

    def draws(most=math.inf):
        n = 2 * batch if cuda else 200
        return r.fisher_draws(images, labels, n, batch, r.rng(0, "fisher", 0, device))

    def fisher_of(fisher):
        torch.backends.cudnn.allow_tf32 = False  # on both sides: what differs is then the way
        return fisher(models["student"], draws)

    yield (
        *("mu and c* of one task", 1.5, 30, 1e-4),
        *(partial(fisher_of, fisher) for fisher in (plain_rank1_fisher, r.rank1_fisher)),
    )
    yield (
        *("diagonal of F", 1.5, 15, 1e-4),
        *(partial(fisher_of, fisher) for fisher in (plain_diagonal_fisher, r.diagonal_fisher)),
    )

    def as_run(fast):  # as a run sets PyTorch, or as it comes
        torch.use_deterministic_algorithms(bool(fast) and cuda, warn_only=True)
        torch.backends.cudnn.allow_tf32 = not fast

    start, pool = copy.deepcopy(models["student"].state_dict()), (images.flip(0), labels.flip(0))

    def trained(train, fast):
        as_run(fast)
        model = models[f"{fast}student"]
        model.load_state_dict(start)
        generators = {p: r.rng(0, p, 0, device) for p in ("order", "replay", "noise", "dropout")}
        return train(model, models[f"{fast}teacher"], generators)  # mean losses of the last ten steps

    def our_training(model, teacher, generators):
        optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
        log, held = io.StringIO(), None
        given = model, optimizer, generators, teacher, held, images, labels, pool, log
        r.train_task(cfg, 1, 0, *given, lambda epoch: None)
        last = json.loads(log.getvalue().splitlines()[-1])
        return [last["denoise"], last["distill"]]

    def their_training(model, teacher, generators):
        return plain_training(cfg, model, teacher, images, labels, pool, generators, steps)

    yield (
        *(f"{steps} training steps with replay and distillation", 1.3, 3, None),
        *(partial(trained, their_training, ""), partial(trained, our_training, "fast ")),
    )

    theta = r.flat(models["student"].parameters())
    penalty, stored = r.LowRankPenalty(1.0), []
    for _ in range(19):
        mu, step = (torch.randn(theta.shape, generator=generator).to(device) for _ in range(2))
        penalty.add((mu[None], mu.new_tensor([1e-6])), theta + 0.01 * step)
        stored.append((mu.double(), 1e-6, (theta + 0.01 * step).double()))
    held = penalty.start(theta)

    def gradient(of):
        weights = theta.clone().requires_grad_()
        return torch.autograd.grad(of(weights), weights)[0]

    yield (
        *("penalty and its gradient after 19 tasks", None, None, None),
        *(partial(gradient, partial(plain_penalty, 1.0, stored)), partial(gradient, held)),
        [sum(v.nbytes for v in kept) / 2**20 for kept in ([v for s in stored for v in s[::2]], [penalty.a])],
    )
    del stored, held, penalty

    def paint(name):
        generator = r.rng(0, "pool", 0, device)
        as_run(name == "fast teacher")
        if name == "fast teacher":
            with r.autocast(cfg, device):
                sampling = cfg.replay_per_class, cfg.sample_steps
                return r.replay_pool(models[name], shape, old, *sampling, generator, "replay")[0]
        painted = []
        for c in range(old):
            for n in torch.ones(cfg.replay_per_class).split(r.SAMPLE_BATCH):
                noise = torch.randn(len(n), *shape, generator=generator, device=device)
                y = torch.full((len(n),), c, device=device)
                painted.append(r.to_uint8(r.ddim_sample(models[name], noise, y, cfg.sample_steps)))
        return torch.cat(painted)

    yield "sampling the replay pool", 1.3, 3, None, partial(paint, "teacher"), partial(paint, "fast teacher")

    a, b = (np.random.default_rng(seed).normal(size=(2000, 2048)) ** 2 + seed / 10 for seed in range(2))
    yield (
        *("Frechet distance, 2048 features, 2000 images a side", 10, 10, 1e-3),
        *(partial(plain_frechet_distance, a, b), partial(r.frechet_distance, a, b)),
    )

    many = torch.randint(0, 256, (12000, 1, 32, 32), dtype=torch.uint8, generator=generator)
    loader = torch.utils.data.DataLoader(PILImages(many), batch)
    yield (
        *("reading a task's 12,000 images once", 20, 20, 1e-4),
        lambda: torch.stack([x.to(device).mean() for x in loader]),
        lambda: torch.stack([r.to_float(x).mean() for x in many.to(device).split(batch)]),
    )


def step_against_matrix_products(cfg, device, seconds):
    """What share of the device's measured matrix-product peak a training step of so many seconds reaches."""
    channels, size, classes, *_ = r.SIZES[cfg.dataset]
    model = r.UNet(channels, classes, cfg.channels, cfg.layers_per_block, 0.0).to(device)
    n, zeros = 2 * cfg.batch_size, torch.zeros(2 * cfg.batch_size, dtype=torch.long, device=device)
    x = torch.zeros(n, channels, size, size, device=device)
    with FlopCounterMode(display=False) as counter:
        r.losses(model, copy.deepcopy(model), (x, zeros, x, zeros), cfg.batch_size)[0].backward()
    bf16 = r.speedup(cfg, "bf16", device)
    square = torch.randn((8192,) * 2 if device.type == "cuda" else (2048,) * 2, device=device)
    square = square.bfloat16() if bf16 else square
    best = min(timed(device, lambda: square @ square)[0] for _ in range(20))
    peak = 2 * len(square) ** 3 / best
    return {
        "GFLOP a step": counter.get_total_flops() / 1e9,
        "matrix-product peak, GFLOP/s": peak / 1e9,
        "share": counter.get_total_flops() / seconds / peak,
    }


def bench_results(device):
    """AFID of a short digits run of each seed, with and without what may change its rounding."""
    torch.set_num_threads(1)  # faster, for this network, wherever anything else is running
    variants = {
        "plain": "--no-bf16 --no-compile",
        "bf16": "--bf16 --no-compile",
        "compile": "--no-bf16 --compile",
    }
    variants |= {"accumulate 2": "--no-bf16 --no-compile --accumulate 2"}
    variants |= {"bf16, compile": "--bf16 --compile"} if device.type == "cuda" else {}
    found = {}
    for name, flags in variants.items():
        torch._dynamo.reset()
        found[name] = []
        for seed in range(3):
            argv = f"--epochs 27 --replay-per-class 50 --seed {seed} --device {device.type} {flags} --out"
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                found[name].append(r.main([*argv.split(), folder])["afid"][-1])
            print(f"  {name}, seed {seed}: {found[name][-1]:.1f}", flush=True)
    return found


def bench():
    """A table on the screen; all of it in results/bench-<device>.json."""
    torch.set_num_threads(os.cpu_count())
    r.BAR["disable"] = True
    device = r.find_device("auto")
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    cfg = r.parse_args(["--dataset=mnist" if cuda else "--dataset=digits", "--dropout=0", "--epochs=1"])
    cfg.lr_decay = "none"
    if cuda:  # less to paint than in the paper, with the same network and batches
        cfg.sample_steps, cfg.replay_per_class = 10, 100
    lines = {}
    for work, on_cpu, on_gpu, *ways in bench_ways(cfg, device):
        print(f"{work}: ", end="", flush=True)
        lines[work] = compare_ways(device, work, on_gpu if cuda else on_cpu, *ways)
        print(f"{lines[work]['ratio']:.1f} times as fast", flush=True)
    step = next(v["ours s"] for work, v in lines.items() if "steps" in work) / 20
    reached = step_against_matrix_products(cfg, device, step)
    penalty = lines["penalty and its gradient after 19 tasks"]
    penalty["share of a step"] = penalty["ours s"] / step
    penalty["passed"] = penalty["ours MB"] <= penalty["plain MB"] / 3
    penalty["passed"] &= penalty["share of a step"] <= 0.05 or not cuda

    def cell(v):
        return "-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)

    head = ["work", "plain s", "ours s", "ratio", "at least", "plain MB", "ours MB", "difference", "same to"]
    print(f"\n{name}, torch {torch.__version__}, {cfg.dataset}'s network at batch {cfg.batch_size}\n")
    print(r.markdown([[*head, "passed"], *([cell(v[k]) for k in (*head, "passed")] for v in lines.values())]))
    path = SCRIPT.parent / "results" / f"bench-{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
    found = {"device": name, "torch": torch.__version__, "dataset": cfg.dataset, "batch": cfg.batch_size}
    found |= {"lines": [*lines.values()], "step": {"seconds": step} | reached}
    r.write_json(path, found)

    print("\nAFID of short digits runs")
    results = bench_results(device)
    low, high = min(results["plain"]), max(results["plain"])
    within = {variant: bool(low <= np.mean(afid) <= high) for variant, afid in results.items()}
    r.write_json(path, found | {"AFID of short runs": results, "mean within the plain runs' spread": within})
    print(f"mean within the spread of the plain runs' seeds: {within}")
    print(f"a training step reaches {reached['share']:.0%} of the matrix-product peak measured here")


if __name__ == "__main__":
    bench()
