"""The claims of rank1_ewc.py and of results/, a test each; the oracle is the slow, obvious way.

`slow` are the tests that train whole runs: `pytest -m "not slow"` checks the formulas alone.
"""

import copy
import hashlib
import json
import math
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import cleanfid.fid
import numpy as np
import pytest
import torch
import torchvision

import rank1_ewc as r
from results import geometry

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


def settings(**changed):
    """Settings as parse_args and set_up make them, on the CPU."""
    cfg = r.parse_args(QUICK)
    vars(cfg).update({"device": "cpu", "bf16": False, "compile": False} | changed)
    return cfg


# ---- denoiser and diffusion


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((1, 10), 37_191_681),
        ((3, 10), 37_196_291),
        ((3, 1000), 37_703_171),
        ((1, 10, (16,), 1), 41_793),  # the authors' small network
    ],
)
def test_unet_has_as_many_parameters_as_the_papers(arguments, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in r.UNet(*arguments).parameters()) == count


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
        norm_num_groups=max(8, channels[0] // 4),
    )


@pytest.mark.parametrize("sizes", [((128, 256, 256, 256), 2), ((16, 32), 1), ((8, 16, 24), 1), ((16,), 1)])
def test_unet_and_diffusers_share_weights_both_ways_and_give_the_same_output(sizes):
    theirs, ours = diffusers_unet(*sizes).eval(), r.UNet(1, 10, *sizes).eval()
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


def test_channels_that_do_not_fit_the_norms_raise_a_value_error():
    with pytest.raises(ValueError, match="multiples of 8"):
        r.UNet(1, 10, (8, 12))


def test_add_noise_has_the_mean_and_variance_of_the_forward_process():
    betas = np.linspace(1e-4, 0.02, 1000)
    x0, eps = torch.full((1, 1, 400, 400), 0.7), torch.randn(1, 1, 400, 400, generator=generator())
    for t in (0, 300, 999):
        abar = math.prod(1 - betas[: t + 1])
        x_t = r.add_noise(x0, torch.tensor([t]), eps)
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
    assert (r.to_float(every).min(), r.to_float(every).max()) == (-1, 1)


# ---- Fisher


def gradients_one_by_one(model, batches):
    """g_i (n, D) in float64, a backward pass per sample."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    g = []
    for batch in batches:
        for x0, t, eps, y in zip(*batch):
            x_t = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
            loss = ((model(x_t[None], t[None], y[None])[0] - eps) ** 2).mean()
            g.append(r.flat(torch.autograd.grad(loss, model.parameters())))
    return torch.stack(g).double()


@pytest.mark.parametrize("n", [10, 40, 4000])
def test_fisher_samples_take_every_image_equally_often_with_its_label_at_random_timesteps(n):
    images, labels = small_images(40)
    labels = labels.sort().values  # class after class, as the data is held
    x0, t, eps, y = (torch.cat(v) for v in zip(*r.fisher_batches(images, labels, n, generator())))
    which = [int((r.to_float(images) == x).flatten(1).all(1).nonzero()) for x in x0]
    assert labels[which].equal(y)
    assert set(np.bincount(which, minlength=40)) == {n // 40} if n >= 40 else len(set(which)) == n
    assert t.min() < 1000 / n**0.5 < 1000 - 1000 / n**0.5 < t.max()
    assert eps.mean().abs() < 0.1


def test_fisher_timesteps_bound_the_timesteps():
    *_, (_, t, _, _) = r.fisher_batches(*small_images(), 100, generator(), (333, 337))
    assert set(t.tolist()) == {333, 334, 335, 336}


@pytest.mark.parametrize("n", [6, 10])  # each image once, and some twice
def test_mu_and_c_star_match_per_sample_gradients_c_star_over_fresh_draws(n):
    model, (images, labels) = small_unet(dropout=0.5), small_images()
    mu, c_star = r.rank1_fisher(model, images, labels, n, generator(3))
    draws = generator(3)  # the first n samples give mu, the next n c*
    mean = gradients_one_by_one(model, r.fisher_batches(images, labels, n, draws)).mean(0)
    fresh = gradients_one_by_one(model, r.fisher_batches(images, labels, n, draws))
    torch.testing.assert_close(mu.double(), mean, atol=1e-3 * mean.abs().max().item(), rtol=0)
    assert float(c_star) == pytest.approx(float((fresh @ mean).square().mean() / mean.norm() ** 4), rel=1e-3)


def test_diagonal_fisher_matches_per_sample_gradients():
    model, (images, labels) = small_unet(dropout=0.5), small_images()
    diagonal = r.diagonal_fisher(model, images, labels, 10, generator(3))
    g = gradients_one_by_one(model, r.fisher_batches(images, labels, 10, generator(3)))
    exact = g.square().mean(0)
    torch.testing.assert_close(diagonal.double(), exact, atol=1e-3 * exact.max().item(), rtol=0)


def test_eigenpairs_from_the_gram_matrix_are_those_of_f():
    G = torch.randn(7, 30, generator=generator()) * torch.arange(1.0, 31)
    values, vectors = r.eigenpairs(G, 3)
    exact, directions = torch.linalg.eigh((G.T @ G / 7).double())
    torch.testing.assert_close(values, exact.flip(0)[:7], rtol=1e-4, atol=1e-3)
    cosines = (vectors.double() @ directions.flip(1)[:, :3]).abs()
    torch.testing.assert_close(cosines, torch.eye(3).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("k", [1, 4])
def test_rank_k_fisher_is_the_best_of_rank_k_for_the_per_sample_gradients(k):
    model, (images, labels) = small_unet(dropout=0.5), small_images()
    v, values = r.rank_k_fisher(model, images, labels, 12, generator(3), k=k)
    g = gradients_one_by_one(model, r.fisher_batches(images, labels, 12, generator(3)))  # F = g^T g / 12
    _, singular, directions = torch.linalg.svd(g / math.sqrt(12), full_matrices=False)
    torch.testing.assert_close(values.double(), singular[:k] ** 2, rtol=1e-3, atol=0)
    cosines = (v.double() @ directions[:k].T).abs()
    torch.testing.assert_close(cosines, torch.eye(k).double(), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("fit", "most", "kept"), [(5, 1024, 5), (100, 7, 7)])
def test_rank_k_fisher_keeps_no_more_gradients_than_fit(monkeypatch, fit, most, kept):
    model, shapes = small_unet(), []
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(r, "GRADIENT_FLOATS", fit * weights)
    monkeypatch.setattr(r, "GRADIENTS", most)
    monkeypatch.setattr(r, "eigenpairs", lambda G, k: shapes.append(G.shape) or (G[:, 0], G[:k]))
    r.rank_k_fisher(model, *small_images(), 12, generator(), k=2)
    assert shapes == [(kept, weights)]


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
    g = gradients_one_by_one(ScaledIdentity(), r.fisher_batches(*small_images(), 12, generator(3)))
    directions = g / g.norm(dim=1, keepdim=True)
    cosines = (directions @ directions.T).abs()
    torch.testing.assert_close(cosines, torch.ones(12, 12).double(), atol=1e-6, rtol=0)
    assert g.norm(dim=1).std() > 0.01 * g.norm(dim=1).mean()  # and differ in length: c(x_t)


def test_theorem_1_the_fisher_of_a_scaled_identity_is_c_star_mu_mu_transposed():
    model, (images, labels), draws = ScaledIdentity(), small_images(), generator(3)
    mu, c_star = r.rank1_fisher(model, images, labels, 12, draws)
    draws.manual_seed(3)
    list(r.fisher_batches(images, labels, 12, draws))  # mu's draws; F and c* are of the next
    g = gradients_one_by_one(model, r.fisher_batches(images, labels, 12, draws))
    F = g.T @ g / 12
    torch.testing.assert_close(c_star * torch.outer(mu, mu).double(), F, atol=1e-5 * float(F.norm()), rtol=0)


# ---- penalties: against the paper's formulas with every theta*_k kept


def three_tasks(dim=50):
    """mu_k, c*_k, F_k and theta*_k of three tasks, and weights on the way through a fourth."""
    rows = torch.randn(10, dim, generator=generator(1))
    tasks = [(0.3 * rows[k], torch.tensor(1.5 + k), rows[3 + k].square(), rows[6 + k]) for k in range(3)]
    return tasks, tasks[-1][3] + 0.1 * rows[9]


def value_and_gradient(penalty, theta):
    theta = theta.clone().requires_grad_()
    value = penalty(theta)
    return value.detach(), torch.autograd.grad(value, theta)[0]


def assert_same_value_and_gradient(penalty, formula, theta):
    ours, exact = value_and_gradient(penalty, theta), value_and_gradient(formula, theta.double())
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def rank1_penalty_of(tasks, lam=7.0):
    penalty = r.LowRankPenalty(lam)
    for mu, c_star, _, theta_star in tasks:
        penalty.add((mu, c_star), theta_star)
    return penalty


def test_rank1_penalty_and_its_gradient_equal_the_formula_with_stored_weights():
    tasks, theta = three_tasks()

    def formula(theta):
        return 7 / 2 * sum(c * (mu.double() @ (theta - star.double())) ** 2 for mu, c, _, star in tasks)

    assert_same_value_and_gradient(rank1_penalty_of(tasks), formula, theta)


def test_rank_k_penalty_and_its_gradient_equal_the_formula_with_stored_weights():
    tasks, theta = three_tasks()
    fishers = [(torch.stack([tasks[k][0], tasks[k - 1][0]]), torch.tensor([2.0, 0.5 + k])) for k in range(3)]
    penalty = r.LowRankPenalty(lam=7.0)
    for fisher, (_, _, _, theta_star) in zip(fishers, tasks):
        penalty.add(fisher, theta_star)

    def formula(theta):
        total = 0.0
        for (vectors, values), (_, _, _, star) in zip(fishers, tasks):
            for v, c in zip(vectors, values):
                total += 7 / 2 * c * (v.double() @ (theta - star.double())) ** 2
        return total

    assert_same_value_and_gradient(penalty, formula, theta)


def test_diagonal_penalty_and_its_gradient_equal_the_formula_with_stored_weights():
    tasks, theta = three_tasks()
    penalty = r.DiagonalPenalty(lam=7.0)
    for _, _, fisher, theta_star in tasks:
        fisher[:5] = 0  # weights that no task cares for
        penalty.add(fisher, theta_star)

    def formula(theta):
        return 7 / 2 * sum((f.double() * (theta - star.double()) ** 2).sum() for _, _, f, star in tasks)

    assert_same_value_and_gradient(penalty, formula, theta)
    assert penalty.drift(theta).item() == pytest.approx(math.sqrt(formula(theta).item() * 2 / 7), rel=1e-4)


def test_drift_is_how_far_the_weights_moved_along_every_old_mu():
    tasks, theta = three_tasks()
    exact = [float(mu @ (theta - theta_star)) for mu, _, _, theta_star in tasks]
    assert rank1_penalty_of(tasks).drift(theta).tolist() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("eta", [1e-3, 10.0])
def test_the_proximal_step_minimizes_penalty_plus_distance(eta):
    tasks, theta = three_tasks()
    penalty = rank1_penalty_of(tasks)
    z = penalty.proximal_step(theta, eta)
    gradient = value_and_gradient(lambda z: penalty(z) + (z - theta).square().sum() / (2 * eta), z)[1]
    before = value_and_gradient(penalty, theta)[1]
    assert gradient.norm() < 1e-3 * before.norm()


def test_penalties_keep_one_copy_of_the_weights_for_any_number_of_tasks():
    tasks, _ = three_tasks(dim=50)
    low_rank, diagonal = rank1_penalty_of(tasks), r.DiagonalPenalty(1.0)
    for _, _, fisher, theta_star in tasks:
        diagonal.add(fisher, theta_star)
    kept = {name: tuple(v.shape) for name, v in vars(low_rank).items() if torch.is_tensor(v)}
    assert kept == {"v": (3, 50), "c": (3,), "offset": (3,), "origin": (50,)}
    assert {name: v.shape for name, v in vars(diagonal).items() if torch.is_tensor(v)} == {
        "H": (50,),
        "center": (50,),
    }


def test_rank1_penalty_is_exact_at_the_papers_size_in_float32():
    D, g = 37_191_681, generator(2)
    mu = 1e-5 * torch.randn(D, generator=g)
    theta_star, theta_start = (0.05 * torch.randn(D, generator=g) for _ in range(2))
    theta = theta_start + 1e-5 * torch.randn(D, generator=g) + 3e-4 * mu
    from_start = mu.double() @ (theta.double() - theta_start.double())
    from_first = mu.double() @ (theta.double() - theta_star.double())
    c_star = torch.tensor(2.5)
    both = rank1_penalty_of([(mu, c_star, None, theta_star), (mu, c_star, None, theta_start)], lam=15000.0)
    exact = 15000 / 2 * 2.5 * (from_start**2 + from_first**2)
    assert both(theta).item() == pytest.approx(exact.item(), rel=1e-4)
    # With the last task alone the penalty is tiny: mu^T theta - mu^T theta* in float32 would drown it.
    alone = rank1_penalty_of([(mu, c_star, None, theta_start)], lam=15000.0)
    exact = (15000 / 2 * 2.5 * from_start**2).item()
    assert alone(theta).item() == pytest.approx(exact, rel=1e-3)


# ---- replay and distillation


class Painter(torch.nn.Module):
    """An eps that leads to an image as grey as the class says, whatever the noise."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, y):
        abar = r.alphas_cumprod(CPU)[t][:, None, None, None]
        return (x_t - abar.sqrt() * (y[:, None, None, None] / 5 - 0.5)) / (1 - abar).sqrt()


def test_replay_pool_holds_equally_many_uint8_images_of_every_old_class():
    x, y = r.replay_pool(settings(replay_per_class=30), Painter(), (1, 8, 8), 4)
    assert (x.dtype, x.shape) == (torch.uint8, (120, 1, 8, 8))
    assert y.bincount().tolist() == [30, 30, 30, 30]
    grey = torch.tensor([64, 89, 115, 140])  # (y / 5 - 0.5 + 1) * 127.5
    assert (x.float() - grey[y][:, None, None, None]).abs().max() <= 1


def test_the_pools_nth_image_starts_from_the_same_noise_for_every_class_and_after_every_task(monkeypatch):
    starts = []
    monkeypatch.setattr(r, "ddim_sample", lambda model, noise, y, steps: starts.append(noise) or noise)
    for num_old in (2, 4):
        r.replay_pool(settings(replay_per_class=70), Painter(), (1, 8, 8), num_old)
    noise = torch.cat(starts).view(2 + 4, 70, 1, 8, 8)
    assert all(noise[k].equal(noise[0]) for k in range(6))
    assert not noise[0, 0].equal(noise[0, 1])


def test_without_a_teacher_the_denoising_loss_is_over_all_rows_and_there_is_no_distillation():
    model, (images, labels) = small_unet().eval(), small_images()
    batch = next(r.fisher_batches(images, labels, 6, generator()))
    denoise, distill = r.losses(model, None, *batch)
    torch.testing.assert_close(denoise, r.per_sample_loss(model, *batch).mean())
    assert distill == 0


def test_one_student_pass_denoises_the_real_rows_and_imitates_the_teacher_on_the_replayed_ones():
    models, seen = {"student": small_unet().eval(), "teacher": small_unet(seed=1).eval()}, {}

    def spy(name):
        def predict(x_t, t, y):
            assert name not in seen  # one pass only
            seen[name] = (x_t, t, y)
            return models[name](x_t, t, y)

        return predict

    x0, t, eps, y = next(r.fisher_batches(*small_images(), 6, generator()))
    denoise, distill = r.losses(spy("student"), spy("teacher"), x0, t, eps, y)
    for ours, theirs in zip(seen["student"], seen["teacher"]):
        assert torch.equal(ours[3:], theirs)
    x_t = r.add_noise(x0, t, eps)
    real = [
        ((models["student"](x_t[i : i + 1], t[i : i + 1], y[i : i + 1]) - eps[i]) ** 2).mean()
        for i in range(3)
    ]
    torch.testing.assert_close(denoise, torch.stack(real).mean())
    difference = models["student"](x_t[3:], t[3:], y[3:]) - models["teacher"](x_t[3:], t[3:], y[3:])
    torch.testing.assert_close(distill, difference.square().mean())


def test_distillation_has_no_gradient_where_student_and_teacher_agree():
    student, batch = small_unet().eval(), next(r.fisher_batches(*small_images(), 6, generator()))
    _, same = r.losses(student, copy.deepcopy(student), *batch)
    _, other = r.losses(student, small_unet(seed=1).eval(), *batch)
    norms = [r.flat(torch.autograd.grad(loss, student.parameters())).norm() for loss in (same, other)]
    assert norms[0] < 1e-4 * norms[1]  # not 0: the teacher's smaller batch may be rounded differently


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_step_is_one_step_of_adam_on_the_sum_of_the_three_losses(accumulate):
    cfg = settings(method="rank1", lr=1e-2, accumulate=accumulate)
    student, teacher = small_unet().eval(), small_unet(seed=1).eval()
    theta = r.flat(student.parameters()).detach()
    penalty = r.LowRankPenalty(lam=3.0)
    penalty.add((torch.ones_like(theta), torch.tensor(2.0)), theta - 1e-4)
    batch = next(r.fisher_batches(*small_images(12), 12, generator()))

    expected = copy.deepcopy(student)
    denoise, distill = r.losses(expected, teacher, *batch)
    ewc = penalty(r.flat(expected.parameters()))
    (denoise + distill + ewc).backward()
    torch.optim.Adam(expected.parameters(), lr=1e-2).step()

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    state = r.State(student, optimizer, teacher=teacher, penalty=penalty, task=1)
    step_losses = r.train_step(cfg, state, batch)
    torch.testing.assert_close(
        step_losses, torch.stack([denoise, distill, ewc]).detach(), rtol=1e-4, atol=1e-6
    )
    moved, right = (r.flat(m.parameters()) - theta for m in (student, expected))
    assert (moved - right).norm() < 0.02 * right.norm()  # Adam's first step is the gradient's sign


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


def test_inception_gets_rgb_in_0_to_255_and_resizes_itself(monkeypatch):
    asked, shapes = [], set()

    def mean_colour(batch):
        shapes.add(tuple(batch.shape[1:]))
        return batch.mean((2, 3))

    def build(mode, device, use_dataparallel):
        asked.append(mode)
        return mean_colour

    monkeypatch.setattr(r.cleanfid.features, "build_feature_extractor", build)
    images = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    features = r.inception_features(CPU)(images)
    assert (asked, shapes) == (["legacy_tensorflow"], {(3, 8, 8)})
    np.testing.assert_allclose(features, np.arange(250)[:, None].repeat(3, 1), atol=1e-3)


def test_classifier_is_good_and_is_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(r, "CACHE", tmp_path)
    data = r.load_data("digits", tmp_path)
    features = r.classifier_features("digits", data, CPU)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = r.classifier_features("digits", data, CPU)
    accuracy = float(capsys.readouterr().out.split(", ")[1].split("%")[0])
    assert accuracy > 95
    assert file.stat().st_mtime_ns == written
    assert np.array_equal(features(data.test_x[:20]), again(data.test_x[:20]))
    assert features(data.test_x[:20]).shape == (20, 64)


# ---- data


def test_digits_are_all_there_once_with_about_160_test_images_a_task():
    data = r.load_data("digits", Path())
    assert len(data.y) + len(data.test_y) == 1797
    assert (data.x.dtype, data.x.min(), data.x.max()) == (torch.uint8, 0, 255)
    assert all(150 <= len(task.test_y) <= 170 for task in r.split_tasks(data, 5))


@pytest.mark.parametrize(("tasks", "per_task"), [(5, 2), (20, 50)])
def test_tasks_hold_every_class_once_in_label_order(monkeypatch, tasks, per_task):
    y = torch.randint(tasks * per_task, (60000,), generator=generator())
    images = y[:, None].expand(-1, 4)  # an image shows its label
    monkeypatch.setitem(r.LOADERS, "any", lambda _: r.Data(images, y, images[:20000], y[:20000]))
    parts = r.split_tasks(r.load_data("any", Path()), tasks)
    assert len(parts) == tasks
    for k, part in enumerate(parts):
        for x, labels in ((part.x, part.y), (part.test_x, part.test_y)):
            assert sorted(set(labels.tolist())) == list(range(k * per_task, (k + 1) * per_task))
            assert torch.equal(x[:, 0], labels)
    assert (sum(len(part.y) for part in parts), sum(len(part.test_y) for part in parts)) == (
        60000,
        20000,
    )
    assert parts[0].x.untyped_storage().data_ptr() == parts[1].x.untyped_storage().data_ptr()  # views


def test_limit_keeps_the_first_images_of_each_class():
    data = r.load_data("digits", Path())
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


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_idx_files_are_read_and_padded_to_32(tmp_path, no_network, name, folder):
    write_idx(tmp_path / folder / "raw", 600, 100)
    data = r.load_data(name, tmp_path)
    assert (data.x.shape, data.test_x.shape) == ((600, 1, 32, 32), (100, 1, 32, 32))
    assert data.y.equal(torch.arange(10).repeat_interleave(60))
    assert data.test_y.equal(torch.arange(10).repeat_interleave(10))
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
        images = np.full((20, 3, 32, 32), i, np.uint8)
        images[:, 1] = np.arange(32)[:, None]  # green: the row
        images[:, 2] = np.arange(32)  # blue: the column
        return {"data": images.reshape(20, 3072), "labels": [*range(9, -1, -1)] * 2}

    monkeypatch.setattr(dataset, "train_list", [write(f"data_batch_{i}", batch(i)) for i in range(1, 6)])
    monkeypatch.setattr(dataset, "test_list", [write("test_batch", batch(6))])
    md5 = write("batches.meta", {"label_names": ["any"] * 10})[1]
    monkeypatch.setattr(dataset, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    data = r.load_data("cifar10", tmp_path)
    assert (data.x.dtype, data.x.shape, data.test_x.shape) == (torch.uint8, (100, 3, 32, 32), (20, 3, 32, 32))
    assert data.y.tolist() == [c for c in range(10) for _ in range(10)]
    assert data.x[:10, 0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.x[7, 1:, 20, 30].tolist() == [20, 30]

    write("data_batch_3", batch(7))
    with pytest.raises(SystemExit):
        r.load_data("cifar10", tmp_path)
    assert "cifar-10-python.tar.gz" in capsys.readouterr().err


IMAGENET_FILES = [*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"]


def write_npz(folder, classes=20, per_file=44):
    """The downsampled ImageNet's files in small: an image's pixels hold its label, its row and its column."""
    folder.mkdir(parents=True)
    for i, name in enumerate(IMAGENET_FILES):
        labels = np.random.default_rng(i).permutation(np.arange(per_file) % classes) + 1
        images = np.zeros((per_file, 3, 32, 32), np.uint8)
        images[:, 0] = labels[:, None, None]
        images[:, 1], images[:, 2] = np.arange(32)[:, None], np.arange(32)
        np.savez(folder / name, data=images.reshape(per_file, 3072), labels=labels)


def test_imagenet32_is_read_from_npz_files(tmp_path):
    write_npz(tmp_path / "imagenet32")
    data = r.load_data("imagenet32", tmp_path)
    assert (data.x.dtype, data.x.shape, data.test_x.shape) == (torch.uint8, (440, 3, 32, 32), (44, 3, 32, 32))
    for x, y in ((data.x, data.y), (data.test_x, data.test_y)):
        assert y.equal(y.sort().values)
        assert x[:, 0].eq(y[:, None, None] + 1).all()
        assert x[:, 1].eq(torch.arange(32)[:, None]).all()
        assert x[:, 2].eq(torch.arange(32)).all()
    assert [task.y.unique().tolist() for task in r.split_tasks(data, 20)] == [[k] for k in range(20)]


# ---- a whole run


def run_main(out, *argv):
    return r.main([*QUICK, "--out", str(out), *argv])


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
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
    known = [[v is not None for v in row] for row in result["fid"]]
    assert known == [[k <= j for k in range(5)] for j in range(5)]
    assert (result["afid"], result["forgetting"]) == r.afid_and_forgetting(result["fid"])
    assert (result["dataset"], result["method"], result["seed"]) == ("digits", "rank1", 0)
    assert set(result["seconds"]) == {"replay", "train", "fisher", "fid"}
    assert result["config"]["epochs"] == 1
    assert result["script"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    assert len(result["fisher"]) == 4
    assert [len(row) for row in result["drift"]] == [1, 2, 3, 4]  # of every old task, after tasks 2 to 5

    log = read_log(tmp_path / "out")
    assert [line["task"] for line in log] == [1, 2, 3, 4, 5]
    assert all(line["distill"] > 0 and line["ewc"] > 0 for line in log[1:])
    model = r.UNet(1, 10, (8,), layers_per_block=1)
    model.load_state_dict(torch.load(tmp_path / "out/model.pt", weights_only=True))
    for k in range(1, 6):
        picture = torchvision.io.decode_image(str(tmp_path / f"out/samples-task{k}.png"))
        assert picture.shape[1:] == (2 * k * 34 + 2, 10 * 34 + 2)
    assert (tmp_path / "out/fid.png").stat().st_size > 1000
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["joint", "finetune", "replay", "gd", "diag-only", "rank1-only", "diag", "rank4"]
)
def test_each_methods_row_does_what_its_name_says(tmp_path, monkeypatch, method):
    replays = method in ("replay", "gd", "diag", "rank4")
    distills, penalizes = replays and method != "replay", method.startswith(("diag", "rank"))
    tasks, train_task = [], r.train_task

    def spy(cfg, state, task, replay):
        tasks.append((task.y.unique().tolist(), replay and replay[1].unique().tolist()))
        train_task(cfg, state, task, replay)

    monkeypatch.setattr(r, "train_task", spy)
    result, log = run_main(tmp_path, "--method", method), read_log(tmp_path)
    assert [line["distill"] > 0 for line in log] == [k > 0 and distills for k in range(len(log))]
    assert [line["ewc"] > 0 for line in log] == [k > 0 and penalizes for k in range(len(log))]
    assert len(result["fisher"]) == len(result["drift"]) == 4 * penalizes
    assert (result["lam"] > 0) == penalizes
    if method == "joint":
        assert tasks == [(list(range(10)), None)]
        assert (len(result["fid"]), result["fid"][0].count(None), result["forgetting"]) == (1, 0, None)
        assert result["fid_pooled"] > 0
    else:
        assert [classes for classes, _ in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        old = [None] + [list(range(2 * k)) if replays else None for k in range(1, 5)]
        assert [replay for _, replay in tasks] == old
        assert [row.count(None) for row in result["fid"]] == [4, 3, 2, 1, 0]
        assert result["fid_pooled"] is None


@pytest.mark.slow
def test_the_same_seed_gives_the_same_result_and_another_seed_another(tmp_path):
    seeds = ("1", "1", "2")
    results = [run_main(tmp_path / str(i), "--seed", seed, "--dropout=0.1") for i, seed in enumerate(seeds)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert results[0]["fid"] != results[2]["fid"]


@pytest.mark.slow
def test_rank1_without_a_penalty_is_gd_to_the_last_digit(tmp_path):
    # lambda 0 is the baseline, and the Fisher's random draws change nobody else's.
    assert run_main(tmp_path / "a", "--lam", "0")["fid"] == run_main(tmp_path / "b", "--method", "gd")["fid"]


@pytest.mark.slow
def test_a_model_that_does_not_move_has_the_same_fid_after_every_task(tmp_path, monkeypatch):
    monkeypatch.setattr(r, "train_task", lambda *_: None)
    fid = run_main(tmp_path, "--method=finetune")["fid"]
    assert all(fid[j][k] == fid[k][k] for j in range(5) for k in range(j))


@pytest.mark.slow
def test_with_ema_a_task_ends_with_the_average_of_its_weights(tmp_path, monkeypatch):
    average, train_step, evaluate, ends = None, r.train_step, r.evaluate, []

    def step(cfg, state, batch):
        nonlocal average
        if state.step == 0:
            average = r.flat(state.model.parameters()).detach()
        step_losses = train_step(cfg, state, batch)
        average = 0.9 * average + 0.1 * r.flat(state.model.parameters()).detach()
        return step_losses

    def measured(cfg, state, *args):
        ends.append((r.flat(state.model.parameters()).detach().clone(), average))
        evaluate(cfg, state, *args)

    monkeypatch.setattr(r, "train_step", step)
    monkeypatch.setattr(r, "evaluate", measured)
    run_main(tmp_path, "--ema=0.9", "--method=gd")
    assert len(ends) == 5
    for weights, expected in ends:
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_stiff_proximal_step_keeps_the_weights_where_the_old_tasks_want_them(tmp_path):
    drift = run_main(tmp_path / "stiff", "--form=proximal", "--lam=1e9")["drift"]
    free = run_main(tmp_path / "free", "--form=proximal", "--lam=0")["drift"]
    for held, moved in zip(drift, free):
        assert max(map(abs, held)) < 0.01 * max(map(abs, moved))


def test_limit_caps_every_cost_and_flags_still_win():
    cfg = r.parse_args(["--dataset=mnist", "--small", "--limit=50"])
    assert (cfg.replay_per_class, cfg.fisher_samples) == (50, 100)
    assert r.parse_args(["--limit=50", "--fisher-samples=7"]).fisher_samples == 7
    assert r.parse_args(["--limit=500"]).replay_per_class == 200  # no more than without it


def test_small_is_a_row_of_settings_that_flags_still_change_in_a_folder_of_its_own():
    cfg = r.parse_args(["--dataset", "fashion", "--small", "--epochs", "3"])
    assert (cfg.channels, cfg.epochs, str(cfg.out)) == (
        [16, 32, 32, 32],
        3,
        "runs-small/fashion/rank1+seed=0",
    )
    cfg = r.parse_args(["--dataset", "fashion"])
    assert (cfg.epochs, cfg.lam, cfg.lr, cfg.lr_decay, cfg.dropout) == (200, 15000, 2e-4, "none", 0)
    assert (cfg.batch_size, cfg.replay_per_class, cfg.sample_steps, cfg.tasks) == (128, 5000, 50, 5)
    assert r.parse_args(["--small"]).epochs == r.parse_args([]).epochs  # the digits are small
    cfg = r.parse_args(["--dataset", "imagenet32"])
    assert (cfg.epochs, cfg.replay_per_class, cfg.tasks, cfg.channels) == (
        100,
        1300,
        20,
        [128, 256, 256, 256],
    )


def test_an_unfinished_file_never_takes_the_place_of_a_whole_one(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), r.whole(tmp_path / "file") as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


# ---- runs that survive

LONGER = ["--epochs=2", "--dropout=0.1"]
DIES = """
import os, signal, sys, torch
torch.set_num_threads(1)
import rank1_ewc as r

r.CHECKPOINT_SECONDS, save, calls = -1, torch.save, [0]

def dies_in_the_middle_of_the_eighth(*args):
    save(*args)
    calls[0] += 1
    if calls[0] == 8:
        args[1].truncate(1000)
        args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = dies_in_the_middle_of_the_eighth
r.main(sys.argv[1:])
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


def assert_same_but_for_the_seconds(folder, other):
    results = [json.loads((f / "result.json").read_text()) for f in (folder, other)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert (folder / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    ours, theirs = (torch.load(f / "model.pt", weights_only=True) for f in (folder, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def raises_at_call(nth, function, error):
    calls = []

    def wrapped(*args):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return function(*args)

    return wrapped


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_and_started_again_ends_the_same(tmp_path, uninterrupted):
    argv = [*QUICK, *LONGER, "--out", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", DIES, *argv], cwd=SCRIPT.parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    assert r.main(argv)
    assert_same_but_for_the_seconds(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "nth"),
    [
        ("train_step", 11),  # in the second task's second epoch
        ("frechet_distance", 7),  # while measuring after the second task
        ("write_json", 1),  # when all is done but the result
    ],
)
def test_a_run_interrupted_at_any_moment_ends_the_same(tmp_path, uninterrupted, monkeypatch, what, nth):
    with monkeypatch.context() as patch:
        patch.setattr(r, "CHECKPOINT_SECONDS", -1)
        patch.setattr(r, what, raises_at_call(nth, getattr(r, what), KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path, *LONGER)
    assert not (tmp_path / "result.json").exists()
    run_main(tmp_path, *LONGER)
    assert_same_but_for_the_seconds(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["joint", "diag-only", "replay", "rank1 --form=proximal --ema=0.9"])
def test_every_methods_run_goes_on_from_within_a_task(tmp_path, monkeypatch, capsys, method):
    argv = ["--method", *method.split(), "--epochs=3", "--lr-decay=linear"]
    run_main(tmp_path / "whole", *argv)
    with monkeypatch.context() as patch:
        patch.setattr(r, "CHECKPOINT_SECONDS", -1)
        patch.setattr(r, "train_step", raises_at_call(16, r.train_step, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path / "stopped", *argv)
    capsys.readouterr()
    run_main(tmp_path / "stopped", *argv)
    assert f"going on in task {1 if method == 'joint' else 2}/5 after epoch" in capsys.readouterr().out
    assert_same_but_for_the_seconds(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, uninterrupted, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(r, "train_step", raises_at_call(9, r.train_step, KeyboardInterrupt))
        with pytest.raises(SystemExit) as stopped:
            run_main(tmp_path, *LONGER, "--fresh")
    assert stopped.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rank1_ewc: interrupted")
    assert "--fresh" not in last  # which would begin again
    r.main(shlex.split(last.split(": ")[-1])[2:])
    assert_same_but_for_the_seconds(tmp_path, uninterrupted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_goes_on_after_an_interrupt(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(r, "train_step", raises_at_call(17, r.train_step, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path, *LONGER, "--device", "cuda")
    assert len(run_main(tmp_path, *LONGER, "--device", "cuda")["fid"]) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_the_cpu_find_the_same_mu():
    model, batch = (
        small_unet(channels=(16, 32, 32)).eval(),
        next(r.fisher_batches(*small_images(20), 20, generator())),
    )
    g = [gradients_one_by_one(model, [batch]).mean(0)]
    cuda = torch.autograd.grad(
        r.per_sample_loss(model.cuda(), *(v.cuda() for v in batch)).mean(), model.parameters()
    )
    torch.testing.assert_close(
        r.flat(cuda).cpu().double(), g[0], rtol=1e-3, atol=1e-3 * float(g[0].abs().max())
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_finished_run_given_again_prints_its_result_and_does_nothing(uninterrupted, monkeypatch, capsys):
    before = contents(uninterrupted)
    monkeypatch.setitem(r.LOADERS, "digits", None)  # not even the data is read
    result = run_main(uninterrupted, *LONGER)
    assert f"AFID {result['afid'][-1]:.2f}" in capsys.readouterr().out
    assert contents(uninterrupted) == before


@pytest.mark.slow
def test_fresh_starts_over_and_an_old_result_does_not_outlive_it(tmp_path, monkeypatch):
    run_main(tmp_path, "--seed", "1")
    with monkeypatch.context() as patch:
        patch.setattr(r, "train_step", raises_at_call(2, r.train_step, KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_main(tmp_path, "--seed", "2", "--fresh")
    assert not (tmp_path / "result.json").exists()
    assert run_main(tmp_path, "--seed", "2")["seed"] == 2


@pytest.mark.slow
def test_a_run_of_other_settings_is_refused_naming_the_setting_and_nothing_is_touched(
    tmp_path, uninterrupted, capsys
):
    (tmp_path / "checkpoint.pt").write_bytes((uninterrupted / "checkpoint.pt").read_bytes())
    for folder, file in ((uninterrupted, "result.json"), (tmp_path, "checkpoint.pt")):
        before = contents(folder)
        for flag, words in (("--lam=11", "--lam 10.0 11.0"), ("--batch-size=32", "--batch-size 64 32")):
            error = refusal(capsys, *QUICK, *LONGER, flag, "--out", folder)
            assert all(word in error for word in [*words.split(), str(folder / file), "--fresh"])
        assert contents(folder) == before


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_is_exactly_the_state_and_the_settings_read_without_pickles(uninterrupted):
    saved = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    assert set(saved) == {*r.State.__dataclass_fields__, "settings", "script"}
    assert (saved["task"], saved["epoch"]) == (5, 0)
    assert saved["penalty"]["v"].shape[0] == 4


# ---- more than one process


def torchrun(*argv, nodes=1):
    """The exit status and output of two processes, of one machine or of two "machines" that are this one."""
    launch = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        commands = [[*launch, "--standalone", "--nproc_per_node=2"]]
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        rendezvous = [f"--master_port={port}", "--master_addr=localhost"]
        commands = [
            [*launch, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={i}", *rendezvous] for i in range(2)
        ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": SCRIPT.parent}
    started = [subprocess.Popen([*command, str(SCRIPT), *map(str, argv)], **pipes) for command in commands]
    try:
        printed = "".join(process.communicate(timeout=200)[0] for process in started)
    finally:
        for process in started:
            process.terminate()  # of one that hangs: it ends its processes
    return max(process.returncode for process in started), printed


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory):
    return run_once(tmp_path_factory, "--epochs=2")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_on_one_machine_or_on_two_learn_what_one_learns(tmp_path, by_one_process, nodes):
    accumulate = 2 if nodes == 1 else 1
    argv = [*QUICK, "--epochs=2", f"--accumulate={accumulate}", "--out", tmp_path]
    status, printed = torchrun(*argv, nodes=nodes)
    assert status == 0, printed
    assert printed.count("AFID") == 2  # the table's, by rank 0 alone
    two, one = (json.loads((f / "result.json").read_text()) for f in (tmp_path, by_one_process))
    assert (two["processes"], one["processes"]) == (2, 1)
    ours, theirs = read_log(tmp_path), read_log(by_one_process)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for part in ("denoise", "distill", "ewc"):
        expected = pytest.approx([line[part] for line in theirs[:3]], rel=1e-3, abs=1e-5)
        assert [line[part] for line in ours[:3]] == expected
    assert two["fisher"][0]["c_star"] == pytest.approx(one["fisher"][0]["c_star"], rel=1e-4)
    assert two["fid_real"] == pytest.approx(one["fid_real"])
    assert two["afid"] == pytest.approx(one["afid"], rel=1e-2)
    assert contents(tmp_path).keys() == contents(by_one_process).keys()


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(tmp_path, by_one_process):
    code = DIES.replace("calls[0] == 8", "calls[0] == 4")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--no-python",
    ]
    argv = [*QUICK, "--epochs=2", "--out", str(tmp_path)]
    died = subprocess.run(
        [*command, sys.executable, "-c", code, *argv], cwd=SCRIPT.parent, capture_output=True, check=False
    )
    assert died.returncode != 0
    assert not (tmp_path / "result.json").exists()
    result = r.main(argv)
    expected = json.loads((by_one_process / "result.json").read_text())
    assert result["afid"] == pytest.approx(expected["afid"], rel=1e-2)


def test_each_process_paints_its_share_of_the_samples(monkeypatch):
    model, y, noise = small_unet(), torch.arange(10).repeat_interleave(25), torch.randn(25, 1, 8, 8)
    cfg = settings()

    def paint():
        return r.sample_images(cfg, model, noise, y, "")  # 250: two batches of 100, one of 50

    whole = paint()
    monkeypatch.setattr(r, "WORLD", 3)
    monkeypatch.setattr(r, "all_sum", lambda v: v)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(r, "RANK", rank)
        shares.append(paint())
    assert torch.equal(sum(shares), whole)
    assert all(part.any() and not torch.equal(part, whole) for part in shares)


def test_processes_that_do_not_see_the_same_files_are_stopped(capsys, monkeypatch, tmp_path):
    data = r.load_data("digits", tmp_path)
    cfg = settings(out=tmp_path)
    state = r.new_state(cfg, data, CPU)
    monkeypatch.setattr(r, "WORLD", 2)
    monkeypatch.setattr(r, "all_sum", lambda v: v + 1)  # the other process stands one task further
    with pytest.raises(SystemExit):
        r.load_checkpoint(cfg, state)
    assert "same files" in capsys.readouterr().err


# ---- what makes it fast


@pytest.mark.slow
def test_compiled_is_the_same_run_and_nothing_is_compiled_again_after_the_second_task(tmp_path, monkeypatch):
    graphs, train_task, compiler = [], r.train_task, torch.compile

    def counted(*args):
        train_task(*args)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def eager_compile(*args, **options):  # all of the compiler but its last stage
        return compiler(*args, backend="eager", **options)

    argv = ["--replay-per-class=20"]  # fewer than 16 images at once are a case of their own
    expected = run_main(tmp_path / "eager", *argv)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", eager_compile)
    monkeypatch.setattr(r, "train_task", counted)
    result = run_main(tmp_path / "compiled", *argv, "--compile")
    assert 0 < graphs[0] < graphs[1] == graphs[-1]
    assert result["afid"] == pytest.approx(expected["afid"], rel=1e-3)


@pytest.mark.slow
def test_bf16_trains_and_samples_in_bfloat16_and_keeps_weights_and_fisher_in_float32(tmp_path, monkeypatch):
    seen, forward = set(), r.UNet.forward

    def spy(model, x, t, y):
        out = forward(model, x, t, y)
        seen.add((model.training, torch._C._functorch.maybe_current_level() is not None, out.dtype))
        return out

    monkeypatch.setattr(r.UNet, "forward", spy)
    result = run_main(tmp_path, "--bf16", "--method=diag")
    assert all(math.isfinite(v) for v in result["afid"])
    assert {(True, False, torch.bfloat16), (False, False, torch.bfloat16)} <= seen
    assert {dtype for _, derivative, dtype in seen if derivative} == {torch.float32}
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {v.dtype for v in weights.values()} == {torch.float32}


# ---- results/geometry.py: what a trained model says


def test_linear_alone_is_not_enough_for_rank_1():
    # With every entry of A free, the gradients (A x_t - eps) x_t^T share no direction.
    numbers, _, _ = geometry.geometry(AnyMatrix(), r.fisher_batches(*small_images(size=4), 60, generator(3)))
    assert numbers["eigenvalues"][1] > 0.2 * numbers["eigenvalues"][0]


def test_the_geometry_from_the_gram_matrix_is_that_of_the_whole_matrix():
    model, batches = AnyMatrix(), list(r.fisher_batches(*small_images(size=4), 12, generator(3)))
    numbers, mu, all_cos = geometry.geometry(model, batches)
    g = gradients_one_by_one(model, batches)  # (12, 256)
    F, mean = g.T @ g / 12, g.mean(0)
    values, vectors = torch.linalg.eigh(F)
    top, outer = vectors[:, -1], torch.outer(mean, mean)
    c_star = mean @ F @ mean / mean.norm() ** 4
    approximations = {
        "diagonal": F.diag().diag(),
        "mu mu^T": outer,
        "c* mu mu^T": c_star * outer,
        "best of rank 1": values[-1] * torch.outer(top, top),
    }
    exact = {
        "c_star": c_star,
        "mu_norm": mean.norm(),
        "mu_noise": (F.trace() / 12).sqrt(),
        "energy": c_star * mean.norm() ** 2,
        "trace": F.trace(),
        "top_share": values[-1] / F.trace(),
        "cos_mu_top": (top @ mean).abs() / mean.norm(),
        "cos_top": ((g @ top).abs() / g.norm(dim=1)).mean(),
    }
    for name, value in exact.items():
        assert numbers[name] == pytest.approx(float(value), rel=1e-3), name
    errors = {name: float((F - other).norm() / F.norm()) for name, other in approximations.items()}
    assert numbers["error"] == pytest.approx(errors, rel=1e-3)
    assert numbers["eigenvalues"] == pytest.approx(values.flip(0)[:5].tolist(), rel=1e-3)
    torch.testing.assert_close(mu.double(), mean, atol=1e-6, rtol=1e-4)
    cos = (g @ mean).abs() / g.norm(dim=1) / mean.norm()
    assert all_cos.tolist() == pytest.approx(cos.tolist(), abs=1e-3)


def test_figure_1_of_the_best_denoiser_lies_between_the_two_limits_of_proposition_1():
    grey = torch.tensor([[40, 120], [150, 230]], dtype=torch.uint8)  # two classes, of two images each
    y = torch.arange(2).repeat_interleave(20)
    x = grey[:, torch.arange(20) % 2].flatten()[:, None, None, None].expand(-1, 1, 4, 4)

    class Best(torch.nn.Module):  # E[x_0 | x_t, y], the mean of the class's images by their likelihood
        def forward(self, x_t, t, y):
            abar = r.alphas_cumprod(CPU)[t][:, None]
            known, x = r.to_float(grey[y]), x_t.flatten(1)  # (B, 2), (B, 16)
            distance = (x[:, None] - abar[..., None].sqrt() * known[..., None]).square().sum(2)
            x0 = ((-distance / (2 * (1 - abar))).softmax(1) * known).sum(1, keepdim=True)
            return ((x - abar.sqrt() * x0) / (1 - abar).sqrt()).view_as(x_t)

    numbers, _ = geometry.figure_1(Best(), r.Data(x, y, x, y))
    abar, known = r.alphas_cumprod(CPU)[numbers["t"]], r.to_float(grey)
    assert numbers["low noise"] == pytest.approx((abar * known.square().mean()).tolist(), rel=1e-4)
    assert numbers["high noise"] == pytest.approx((abar * known.mean(1).square().mean()).tolist(), rel=1e-4)
    assert numbers["mse"][0] == pytest.approx(numbers["low noise"][0], rel=0.02)  # 1,024 draws of 40 images
    assert numbers["mse"][-3:] == pytest.approx(numbers["high noise"][-3:], rel=0.02)


def test_every_timestep_is_looked_at_with_the_same_images_and_the_same_noise():
    data = r.Data(*small_images(40), *small_images(40))
    x0, _, eps, y = map(torch.cat, zip(*geometry.samples(data, 300)))
    for t in (0, 500, 999):
        same_x0, times, same_eps, same_y = map(torch.cat, zip(*geometry.samples(data, 300, (t, t + 1))))
        assert x0.equal(same_x0)
        assert eps.equal(same_eps)
        assert y.equal(same_y)
        assert times.unique().tolist() == [t]


def test_a_vaes_loss_is_squared_error_and_weighted_divergence_from_a_normal_distribution():
    torch.manual_seed(0)
    vae, x0 = geometry.VAE(16), torch.randn(5, 1, 4, 4, generator=generator())
    eps = torch.randn(5, 1, 4, 4, generator=generator(1))
    image, mean, log_var = vae(x0.flatten(1), eps.flatten(1)[:, :8])
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = (image - x0.flatten(1)).square().mean(1) + 0.3 * kl
    torch.testing.assert_close(geometry.vae_loss(vae, x0, None, eps, None, kl_weight=0.3), expected)


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["1", "2", "3", "vae"])
def test_a_figure_of_a_finished_run_is_its_numbers_and_a_picture(
    tmp_path, uninterrupted, monkeypatch, figure
):
    monkeypatch.setattr(r, "GRADIENTS", 20)
    monkeypatch.setattr(geometry, "TIMES", [100, 700])
    monkeypatch.setattr(geometry, "VAE_STEPS", [0, 5])
    before = contents(uninterrupted)
    geometry.main([figure, str(uninterrupted), "--to", str(tmp_path / "new/figure")])
    numbers = json.loads((tmp_path / "new/figure.json").read_text())
    assert (numbers["samples"], numbers["config"]["method"], numbers["config"]["channels"]) == (
        20,
        "rank1",
        [8],
    )
    assert torchvision.io.decode_image(str(tmp_path / "new/figure.png")).float().std() > 1
    assert contents(uninterrupted) == before


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
        ("--epochs 1000000000000", "--epochs 1e+07"),
        ("--limit 1", "--limit 2 1"),
        ("--lr 0", "--lr 1e-12"),
        ("--dropout 1", "--dropout 0.99"),
        ("--sample-steps 1001", "--sample-steps 1000"),
        ("--channels 8,12", "--channels multiples of 8"),
        ("--channels 32;64", "--channels 32;64"),
        ("--channels 0", "--channels 1"),
        ("--channels 8,8,8,8", "--channels levels 8x8"),
        ("--fisher-timesteps 300,200", "--fisher-timesteps 0,1000"),
        ("--fisher-timesteps 0,2000", "--fisher-timesteps 1000"),
        ("--tasks 3", "--tasks 3 10"),
        ("--batch-size 10 --accumulate 3", "--batch-size 10 3"),
        ("--device tpu", "--device auto cpu cuda"),
        ("--device cuda:99", "--device cuda:99 auto"),
        ("--seed -1", "--seed 0"),
        ("--frobnicate", "--frobnicate"),
        ("--method gd --form proximal", "--form proximal rank"),
        ("--ema 1", "--ema 0.99999"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(capsys, argv, words):
    error = refusal(capsys, *argv.split())
    assert all(word in error for word in words.split())


def test_an_output_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "out") in refusal(capsys, "--out", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist", "MNIST/raw images-idx3 ubyte"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("imagenet32", "imagenet32 train_data_batch_1.npz"),
    ],
)
def test_missing_data_without_a_network_is_refused_with_what_to_put_where(
    capsys, tmp_path, no_network, name, words
):
    error = refusal(capsys, "--dataset", name, "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert all(word in error for word in [*words.split(), str(tmp_path), "--data-dir"])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"data": np.zeros((44, 3072), np.uint8)}, "labels"),
        ({"data": np.zeros((44, 3000), np.uint8), "labels": np.arange(44) % 20 + 1}, "3000 3072"),
        ({"data": np.zeros((44, 3072)), "labels": np.arange(44) % 20 + 1}, "uint8"),
        ({"data": np.zeros((44, 3072), np.uint8), "labels": np.array([{}] * 44)}, "allow_pickle=False"),
        ({"data": np.zeros((44, 3072), np.uint8), "labels": np.arange(44) % 41 + 1}, "lacks images"),
        (None, "damaged"),
    ],
)
def test_an_imagenet_file_of_another_form_is_refused(capsys, tmp_path, arrays, words):
    write_npz(tmp_path / "imagenet32")
    path = tmp_path / "imagenet32/train_data_batch_7.npz"
    np.savez(path, **arrays) if arrays else path.write_bytes(path.read_bytes()[:5000])
    error = refusal(capsys, "--dataset", "imagenet32", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert all(word in error for word in words.split())
    assert ("train_data_batch_7.npz" in error) or words == "lacks images"


@pytest.mark.parametrize(
    ("file", "at", "to"), [("t10k-labels-idx1-ubyte", 9, 77), ("train-images-idx3-ubyte", 2, 1)]
)
def test_a_data_file_with_wrong_contents_is_refused(capsys, tmp_path, no_network, file, at, to):
    write_idx(tmp_path / "MNIST/raw", 600, 100)
    path = tmp_path / "MNIST/raw" / file
    broken = bytearray(path.read_bytes())
    broken[at] = to
    path.write_bytes(broken)
    error = refusal(capsys, "--dataset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert "mnist" in error.lower()
    assert str(tmp_path) in error


def test_inception_weights_that_cannot_be_fetched_are_refused_naming_the_classifier(
    capsys, tmp_path, no_network, monkeypatch
):
    def no_weights(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(r.cleanfid.features.InceptionV3W, "__init__", no_weights)
    assert "--fid classifier" in refusal(capsys, "--fid", "inception", "--out", tmp_path)


def test_a_damaged_classifier_file_is_refused_by_its_name(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(r, "CACHE", tmp_path)
    r.classifier_features("digits", r.load_data("digits", tmp_path), CPU)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert str(path) in refusal(capsys, *QUICK, "--out", tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_the_run_with_task_epoch_and_settings(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_main(tmp_path, "--lr", "1e12")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert all(words in error for words in ("task 1", "epoch 1", "--lr", "1e+12", "--lam"))
