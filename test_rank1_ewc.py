"""The claims of rank1_ewc.py and of results/, a test each; the oracle is the slow, obvious way.

`slow` are the tests that train whole runs: `pytest -m "not slow"` checks the formulas alone.
"""

import copy
import csv
import functools
import hashlib
import itertools
import json
import math
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import cleanfid.fid
import filelock
import numpy as np
import pytest
import scipy.stats
import torch
import torchvision

import rank1_ewc as r
from results import bench, geometry, report

SCRIPT = Path(r.__file__)
CPU = torch.device("cpu")
QUICK = ["--channels=8", "--epochs=1", "--sample-steps=2", "--replay-per-class=3", "--fisher-samples=200"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
torch.set_num_threads(1)  # these networks are too small to share out, and a busy machine makes it very slow


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path_factory):
    """Away from the user's runs and cache; the classifier of the digits is trained once for all tests."""
    torch.manual_seed(0)
    monkeypatch.setitem(r.BAR, "disable", True)
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(r, "CACHE", tmp_path_factory.getbasetemp() / "rank1_ewc")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def spy(monkeypatch, owner, name, see):
    """After every call of owner.name comes see(what it returned, *its arguments)."""
    function = getattr(owner, name)

    def seen(*args):
        out = function(*args)
        see(out, *args)
        return out

    monkeypatch.setattr(owner, name, seen)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_unet(seed=0, channels=(8, 8, 8), **settings):
    torch.manual_seed(seed)
    return r.UNet(1, 10, channels, layers_per_block=1, **settings)


def small_images(n=6, size=8):
    images = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=generator())
    return images, torch.arange(n) % 10


def small_batch(n=6):
    return next(r.fisher_batches(*small_images(n), n, generator()))


def weights_of(model):
    return r.flat(model.parameters()).detach().clone()


def settings(**changed):
    """Settings as parse_args and set_up make them, on the CPU."""
    cfg = vars(r.parse_args(QUICK)) | {"device": "cpu", "bf16": False, "cuda_graph": False}
    return r.Settings(**cfg | changed)


# ---- denoiser and diffusion

PARAMETERS = [((1, 10), 37_191_681), ((3, 10), 37_196_291), ((3, 1000), 37_703_171)]
PARAMETERS += [((1, 10, (16,), 1), 41_793)]  # the authors' small network


@pytest.mark.parametrize(("arguments", "count"), PARAMETERS)
def test_unet_has_as_many_parameters_as_the_papers(arguments, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in r.UNet(*arguments).parameters()) == count


def ours_and_diffusers(channels, layers_per_block):
    """Two networks with the same weights, which both give a tensor."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    ours = r.UNet(1, 10, channels, layers_per_block).eval()
    return ours, bench.plain_network(settings(channels=channels, layers_per_block=layers_per_block), ours)


@pytest.mark.parametrize("sizes", [((128, 256, 256, 256), 2), ((16, 32), 1), ((8, 16, 24), 1), ((16,), 1)])
def test_unet_and_diffusers_share_weights_both_ways_and_give_the_same_output(sizes):
    ours, theirs = ours_and_diffusers(*sizes)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, y = torch.randn(2, 1, 16, 16, generator=generator()), torch.tensor([3, 777]), torch.tensor([1, 9])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y), theirs(x, t, y), atol=1e-4, rtol=0)


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
    x0, eps = torch.full((1, 1, 400, 400), 0.7), torch.randn(1, 1, 400, 400, generator=generator())
    for t in (0, 300, 999):
        abar = math.prod(1 - betas[: t + 1])
        x_t = r.add_noise(x0, torch.tensor([t]), eps)
        assert x_t.mean().item() == pytest.approx(math.sqrt(abar) * 0.7, abs=0.01)
        assert x_t.var().item() == pytest.approx(1 - abar, rel=0.02, abs=1e-6)


def gaussian_denoiser(mean, std):
    """E[eps | x_t, y], in closed form, where every pixel of x_0 is N(mean[y], std^2)."""

    def predict(x, t, y):
        abar, mean_y = (v[:, None, None, None] for v in (r.alphas_cumprod(CPU)[t], torch.tensor(mean)[y]))
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean_y) / (abar * std**2 + 1 - abar)

    return predict


def test_ddim_turns_noise_into_the_gaussian_whose_optimal_denoiser_it_is_given():
    # The probability-flow ODE maps x_999 linearly onto N(mean, std^2); 1000 steps follow it closely.
    mean, std = 0.1, 0.2
    noise, y = torch.randn(2000, 1, 2, 2, generator=generator()), torch.zeros(2000, dtype=torch.long)
    abar = r.alphas_cumprod(CPU)[999].item()
    exact = mean + std * (noise - math.sqrt(abar) * mean) / math.sqrt(abar * std**2 + 1 - abar)
    x0 = r.ddim_sample(gaussian_denoiser([mean], std), noise, y, 1000)
    torch.testing.assert_close(x0, exact, atol=0.02, rtol=0)
    assert x0.std().item() == pytest.approx(std, rel=0.03)


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


def assert_close_to_its_largest(ours, exact, error):
    """No entry is off by more than this share of the largest."""
    torch.testing.assert_close(ours.double(), exact, atol=error * float(exact.abs().max()), rtol=0)


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


def fisher_and_gradients(fisher, n, model=None, **options):
    """What `fisher` says of n samples, the g_i of these, a backward pass each, and the g_i of the next n."""
    model, (images, labels), draws = model or small_unet(dropout=0.5), small_images(), generator(3)
    part = (100, 600)  # of the timesteps
    found = fisher(model, images, labels, n, generator(3), part, **options)
    batches = (r.fisher_batches(images, labels, n, draws, part) for _ in range(2))
    return found, *(gradients_one_by_one(model, drawn) for drawn in batches)


@pytest.mark.parametrize("n", [6, 10])  # each image once, and some twice
def test_mu_and_c_star_match_per_sample_gradients_c_star_over_fresh_draws(n):
    (mu, c_star), g, fresh = fisher_and_gradients(r.rank1_fisher, n)
    mean = g.mean(0)
    assert_close_to_its_largest(mu, mean, 1e-3)
    assert float(c_star) == pytest.approx(float((fresh @ mean).square().mean() / mean.norm() ** 4), rel=1e-3)


def test_diagonal_fisher_matches_per_sample_gradients():
    diagonal, g, _ = fisher_and_gradients(r.diagonal_fisher, 10)
    assert_close_to_its_largest(diagonal, g.square().mean(0), 1e-3)


def cross_entropy(predict, x0, t, eps, y):
    return torch.nn.functional.cross_entropy(predict(x0), y, reduction="none")


def test_the_fishers_take_any_loss_of_single_samples_and_floats_as_they_are():
    x, y = torch.randn(12, 5, generator=generator()), torch.arange(12) % 3
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    mu, c_star = r.rank1_fisher(model, x, y, 12, generator(), loss=cross_entropy)
    diagonal = r.diagonal_fisher(model, x, y, 12, generator(), loss=cross_entropy)
    loss = torch.nn.CrossEntropyLoss()
    grads = [torch.autograd.grad(loss(model(x[[i]]), y[[i]]), model.parameters()) for i in range(12)]
    g = torch.stack([r.flat(parts) for parts in grads]).double()
    mean = g.mean(0)
    assert_close_to_its_largest(mu, mean, 1e-4)
    assert float(c_star) == pytest.approx(float((g @ mean).square().mean() / mean.norm() ** 4), rel=1e-3)
    assert_close_to_its_largest(diagonal, g.square().mean(0), 1e-4)


def test_mu_and_c_star_of_diffusers_network_are_those_of_ours():
    ours, theirs = ours_and_diffusers((16, 32), 1)
    found = [r.rank1_fisher(model, *small_images(), 6, generator()) for model in (ours, theirs)]
    weights = dict(ours.named_parameters())
    mu = dict(zip(weights, r.shaped(found[0][0], weights.values())))
    in_their_order = r.flat(mu[name] for name, _ in theirs.named_parameters())
    assert_close_to_its_largest(in_their_order, found[1][0].double(), 1e-3)
    assert float(found[0][1]) == pytest.approx(float(found[1][1]), rel=1e-3)


def frozen(model):
    return model.requires_grad_(False)


def with_a_batch_norm_that_mixes_samples(model):
    model.norm = torch.nn.BatchNorm2d(1, track_running_stats=False)
    return model


def with_one_broken_class(model):
    model.class_embedding.weight.data[4] = math.nan
    return model


@pytest.mark.parametrize("fisher", [r.rank1_fisher, r.diagonal_fisher])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (frozen, "all weights requires_grad_"),
        (with_a_batch_norm_that_mixes_samples, "batch norm running statistics"),
        (with_one_broken_class, "not finite class 4, timestep loss nan"),
    ],
)
def test_what_the_fishers_cannot_do_they_refuse_and_say_why(fisher, spoil, words):
    with pytest.raises((ValueError, FloatingPointError)) as refused:
        fisher(spoil(small_unet()), *small_images(), 6, generator())
    assert all(word in str(refused.value) for word in words.split())


@pytest.mark.parametrize("fisher", [r.rank1_fisher, r.diagonal_fisher])
def test_the_fishers_refuse_a_loss_that_is_not_a_number_for_each_sample_and_no_samples(fisher):
    model, (x, y) = small_unet(), small_images()
    with pytest.raises(ValueError, match="a number for each sample"):
        fisher(model, x, y, 6, generator(), loss=lambda *a: r.per_sample_loss(*a).mean())
    for n, images in ((0, x), (6, x[:0]), (6, x[:2])):
        with pytest.raises(ValueError, match="cannot take"):
            fisher(model, images, y, n, generator())


def test_mu_is_refused_if_the_loss_does_not_depend_on_the_weights():
    with pytest.raises(FloatingPointError, match="does not depend on the weights"):
        r.rank1_fisher(
            small_unet(), *small_images(), 6, generator(), loss=lambda *a: 0 * r.per_sample_loss(*a)
        )


@pytest.mark.parametrize("k", [1, 4])
def test_rank_k_fisher_is_the_best_of_rank_k_for_the_per_sample_gradients(k):
    (v, values), g, _ = fisher_and_gradients(r.rank_k_fisher, 12, k=k)  # F = g^T g / 12
    _, singular, directions = torch.linalg.svd(g / math.sqrt(12), full_matrices=False)
    torch.testing.assert_close(values.double(), singular[:k] ** 2, rtol=1e-3, atol=0)
    cosines = (v.double() @ directions[:k].T).abs()
    torch.testing.assert_close(cosines, torch.eye(k).double(), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("fit", "most", "kept"), [(5, 1024, 5), (100, 7, 7)])
def test_rank_k_fisher_keeps_no_more_gradients_than_fit(monkeypatch, fit, most, kept):
    model, shapes = small_unet(), []
    weights = len(weights_of(model))
    monkeypatch.setattr(r, "GRADIENT_FLOATS", fit * weights)
    monkeypatch.setattr(r, "GRADIENTS", most)
    spy(monkeypatch, r, "eigenpairs", lambda out, G, k: shapes.append(G.shape))
    r.rank_k_fisher(model, *small_images(), 12, generator(), k=2)
    assert shapes == [(kept, weights)]


def test_rank_k_fisher_refuses_fewer_gradients_than_directions(capsys):
    with pytest.raises(ValueError, match="rank 2 needs at least 2 gradients, not 1"):
        r.rank_k_fisher(small_unet(), *small_images(), 1, generator(), k=2)
    assert "raise --fisher-samples" in refusal(capsys, *QUICK, "--method=rank4", "--fisher-samples=3")


# ---- the theory, where it is exact


class ScaledIdentity(torch.nn.Module):
    """eps_hat = (a^T b) x_t: what Proposition 1 has the best denoiser become; linear in x_t, not in theta."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.randn(20, generator=generator(s))) for s in range(2))

    def forward(self, x, t, y):
        return (self.a @ self.b) * x


class AnyMatrix(torch.nn.Linear):
    """eps_hat = A x_t, every entry of A free: linear too, but not a scaled identity."""

    def forward(self, x, t, y):
        return super().forward(x.flatten(1)).view_as(x)


def test_proposition_2_and_theorem_1_gradients_of_a_scaled_identity_are_on_a_line_and_f_is_c_star_mu_mu():
    (mu, c_star), _, g = fisher_and_gradients(r.rank1_fisher, 12, ScaledIdentity())
    directions = g / g.norm(dim=1, keepdim=True)
    assert_close_to_its_largest((directions @ directions.T).abs(), torch.ones(12, 12).double(), 1e-6)
    assert g.norm(dim=1).std() > 0.01 * g.norm(dim=1).mean()  # and differ in length: c(x_t)
    assert_close_to_its_largest(c_star * torch.outer(mu, mu), g.T @ g / 12, 1e-4)


# ---- penalties: against the paper's formulas with every theta*_k kept


def three_tasks(k=1):
    """(v, c), of k directions, and theta* of each of three tasks; weights on the way through a fourth."""
    rows = torch.randn(3 * k + 4, 50, generator=generator(1))
    v, c, stars = 0.3 * rows[: 3 * k].view(3, k, 50), 1.5 + torch.arange(3.0 * k).view(3, k), rows[-4:-1]
    return list(zip(v.squeeze(1), c.squeeze(1))), stars, stars[-1] + 0.1 * rows[-1]  # k = 1: (mu, c*)


def penalty_of(kind, fishers, stars, lam=7.0):
    penalty = kind(lam)
    for fisher, theta_star in zip(fishers, stars):
        penalty.add(fisher, theta_star)
    return penalty


def value_and_gradient(penalty, theta):
    theta = theta.clone().requires_grad_()
    value = penalty(theta)
    return value.detach(), torch.autograd.grad(value, theta)[0]


def assert_same_value_and_gradient(penalty, formula, theta):
    ours, exact = value_and_gradient(penalty, theta), value_and_gradient(formula, theta.double())
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_rank_k_penalty_its_gradient_and_its_drift_equal_the_formula_with_stored_weights(k):
    fishers, stars, theta = three_tasks(k)
    v, c = (torch.stack(part).view(3 * k, -1).double() for part in zip(*fishers))
    stars_of_v = stars.repeat_interleave(k, 0).double()  # the direction's own theta*, (3 k, D)

    def formula(theta):
        return 7 / 2 * sum(float(c[j]) * (v[j] @ (theta - stars_of_v[j])) ** 2 for j in range(3 * k))

    penalty = penalty_of(r.LowRankPenalty, fishers, stars)
    assert_same_value_and_gradient(penalty, formula, theta)
    exact = [float(v[j] @ (theta - stars_of_v[j])) for j in range(3 * k)]
    assert penalty.drift(theta).tolist() == pytest.approx(exact, abs=1e-4)


def test_diagonal_penalty_its_gradient_and_its_drift_equal_the_formula_with_stored_weights():
    _, stars, theta = three_tasks()
    fishers = torch.randn(3, 50, generator=generator()).square()
    fishers[:, :5] = 0  # weights that no task cares for

    def formula(theta):
        return 7 / 2 * sum((fishers[k] * (theta - stars[k]) ** 2).sum() for k in range(3))

    penalty = penalty_of(r.DiagonalPenalty, fishers, stars)
    assert_same_value_and_gradient(penalty, formula, theta)
    exact = math.sqrt(formula(theta.double()) * 2 / 7)
    assert penalty.drift(theta).tolist() == pytest.approx([exact], rel=1e-4)


@pytest.mark.parametrize("eta", [1e-3, 10.0])
def test_the_proximal_step_minimizes_penalty_plus_distance(eta):
    fishers, stars, theta = three_tasks()
    penalty = penalty_of(r.LowRankPenalty, fishers, stars)
    z = torch.nn.Parameter(theta.clone())
    penalty.proximal_step([z], eta)
    gradient = value_and_gradient(lambda z: penalty(z) + (z - theta).square().sum() / (2 * eta), z)[1]
    assert gradient.norm() < 1e-3 * value_and_gradient(penalty, theta)[1].norm()


@pytest.mark.parametrize("kind", [r.LowRankPenalty, r.DiagonalPenalty])
def test_a_penalty_is_0_before_its_first_task(kind):
    assert kind(7.0)(torch.ones(50)).tolist() == 0


def test_penalties_keep_one_copy_of_the_weights_for_any_number_of_tasks():
    fishers, stars, _ = three_tasks()
    low_rank, diagonal = r.LowRankPenalty, r.DiagonalPenalty
    for kind, old, kept in ((low_rank, fishers, 3 * (50 + 2) + 50), (diagonal, stars**2, 2 * 50)):
        penalty = vars(penalty_of(kind, old, stars))
        assert sum(v.numel() for v in penalty.values() if torch.is_tensor(v)) == kept


def test_rank1_penalty_is_exact_at_the_papers_size_in_float32():
    D, g = 37_191_681, generator(2)
    mu = 1e-5 * torch.randn(D, generator=g)
    theta_star, theta_start = (0.05 * torch.randn(D, generator=g) for _ in range(2))
    theta = theta_start + 1e-5 * torch.randn(D, generator=g) + 3e-4 * mu
    from_start = mu.double() @ (theta.double() - theta_start.double())
    from_first = mu.double() @ (theta.double() - theta_star.double())
    fishers = 2 * [(mu, torch.tensor(2.5))]
    both = penalty_of(r.LowRankPenalty, fishers, [theta_star, theta_start], lam=15000.0)
    exact = 15000 / 2 * 2.5 * (from_start**2 + from_first**2)
    assert both(theta).item() == pytest.approx(exact.item(), rel=1e-6)
    # With the last task alone the penalty is tiny: mu^T theta - mu^T theta* in float32 would drown it.
    alone = penalty_of(r.LowRankPenalty, fishers, [theta_start], lam=15000.0)
    assert alone(theta).item() == pytest.approx((15000 / 2 * 2.5 * from_start**2).item(), rel=1e-3)


# ---- replay and distillation


class Painter(torch.nn.Linear):
    """Its eps leads to an image as grey as the class says, whatever the noise."""

    def forward(self, x, t, y):
        return gaussian_denoiser([-0.5, -0.3, -0.1, 0.1], std=0)(x, t, y)


def test_replay_pool_holds_equally_many_images_of_every_old_class_always_from_the_same_noise(monkeypatch):
    starts, grey = [], torch.tensor([64, 89, 115, 140])  # 127.5 (mean + 1)
    spy(monkeypatch, r, "ddim_sample", lambda x0, model, noise, *_: starts.append(noise))
    for num_old in (2, 4):
        x, y = r.replay_pool(settings(replay_per_class=70), Painter(1, 1), (1, 8, 8), num_old)
        assert (x.dtype, x.shape) == (torch.uint8, (70 * num_old, 1, 8, 8))
        assert y.bincount().tolist() == [70] * num_old
        assert (x.float() - grey[y][:, None, None, None]).abs().max() <= 1
    noise = torch.cat(starts).view(2 + 4, 70, 1, 8, 8)  # the n-th image's, whatever the class and the task
    assert all(noise[k].equal(noise[0]) for k in range(6))
    assert len(noise[0].unique(dim=0)) == 70


def test_one_student_pass_denoises_the_real_rows_and_imitates_a_teacher_on_all_replayed_ones(monkeypatch):
    student, teacher, calls = small_unet().eval(), small_unet(seed=1).eval(), []
    x0, t, eps, y = small_batch()
    x_t = r.add_noise(x0, t, eps)
    ours, theirs = (torch.cat([m(x_t[[i]], t[[i]], y[[i]]) for i in range(6)]) for m in (student, teacher))
    exact = ((ours[:3] - eps[:3]) ** 2).mean(), ((ours[3:] - theirs[3:].detach()) ** 2).mean()
    spy(monkeypatch, r.UNet, "forward", lambda out, model, *inputs: calls.append((model, inputs)))
    found = r.losses(student, teacher, x0, t, eps, y)
    (first, all_rows), (second, replayed) = calls
    assert (first, second) == (student, teacher)
    assert all(v[3:].equal(part) for v, part in zip(all_rows, replayed))
    for values in zip(found, exact):
        torch.testing.assert_close(*values)
        gradients = [r.flat(torch.autograd.grad(v, student.parameters(), retain_graph=True)) for v in values]
        assert_close_to_its_largest(gradients[0], gradients[1].double(), 1e-3)
    denoise, distill = r.losses(student, None, x0, t, eps, y)  # without a teacher all rows are real
    torch.testing.assert_close(denoise, ((ours - eps) ** 2).mean())
    assert distill == 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_step_is_one_step_of_adam_on_the_sum_of_the_three_losses(accumulate):
    cfg = settings(method="rank1", lr=1e-2, accumulate=accumulate)
    student, teacher, batch = small_unet().eval(), small_unet(seed=1).eval(), small_batch(12)
    theta = weights_of(student)
    penalty = r.LowRankPenalty(lam=3.0)
    penalty.add((torch.ones_like(theta), torch.tensor(1e-3)), theta - 1e-4)  # a gradient like the losses'

    expected = copy.deepcopy(student)
    exact = torch.stack([*r.losses(expected, teacher, *batch), penalty(r.flat(expected.parameters()))])
    exact.sum().backward()
    torch.optim.Adam(expected.parameters(), lr=1e-2, eps=1.0).step()

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, eps=1.0)
    state = r.State(student, optimizer, teacher=teacher, penalty=penalty, task=1)
    step_losses = r.train_step(cfg, state, batch, r.gradient_function(cfg, state))
    torch.testing.assert_close(step_losses, exact.detach(), rtol=1e-4, atol=1e-6)
    moved, right = (weights_of(model) - theta for model in (student, expected))
    assert (moved - right).norm() < 1e-3 * right.norm()  # eps 1: else the first step is the gradient's sign


# ---- metric


def test_frechet_distance_equals_clean_fids_and_a_case_solved_by_hand():
    a, b = (torch.randn(200, 8, generator=generator(s)).numpy() * (1 + s) + s for s in range(2))
    exact = cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert r.frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)
    # Uncorrelated axes: each adds (difference of means)^2 + (difference of standard deviations)^2.
    a = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # variance 4/3 on both axes
    by_hand = 2 * 5**2 + 2 * (3 * math.sqrt(4 / 3) - math.sqrt(4 / 3)) ** 2
    assert r.frechet_distance(a, 3 * a + 5) == pytest.approx(by_hand)
    assert r.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_a_tasks_fid_is_of_its_test_images_and_of_samples_with_the_same_labels():
    y = torch.arange(4).repeat_interleave(10)
    x = torch.tensor([64, 89, 115, 140], dtype=torch.uint8)[y][:, None, None, None].expand(-1, 1, 8, 8)
    cfg, state = settings(tasks=2, fid_features="greys"), r.State(Painter(1, 1))  # paints these greys
    tasks, features = r.split_tasks(r.Data(x, y, x, y), 2), lambda images: images[:, 0, 0, :1].numpy()
    r.evaluate(cfg, state, tasks, [features(task.test_x) for task in tasks], features, CPU)
    assert state.fid == [pytest.approx([0, 0], abs=3)]  # of greys that are off by one at most


def test_afid_and_forgetting_equal_a_matrix_worked_by_hand():
    afid, forgetting = r.afid_and_forgetting([[4.0, None, None], [6.0, 10.0, None], [9.0, 12.0, 3.0]])
    assert afid == [4, 8, 8]
    assert forgetting == pytest.approx((5 + 2 + 0) / 3)
    assert r.afid_and_forgetting([[4.0, 5.0, 9.0]]) == ([6], None)  # joint training


def test_inception_gets_rgb_in_0_to_255_and_resizes_itself(monkeypatch):
    asked, shapes = [], set()

    def build(mode, device, use_dataparallel):
        asked.append(mode)
        return lambda batch: shapes.add((*batch.shape[1:],)) or batch.mean((2, 3))  # the mean colour

    monkeypatch.setattr(r.cleanfid.features, "build_feature_extractor", build)
    images = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    colours = np.arange(250)[:, None].repeat(3, 1)
    np.testing.assert_allclose(r.inception_features(CPU)(images), colours, atol=1e-3)
    assert (asked, shapes) == (["legacy_tensorflow"], {(3, 8, 8)})


def test_classifier_is_good_trained_once_and_a_damaged_file_of_it_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(r, "CACHE", tmp_path / "cache")
    data = r.load_data("digits", tmp_path)
    features = r.classifier_features("digits", data, CPU)(data.test_x[:20])
    assert features.shape == (20, 64)
    assert float(capsys.readouterr().out.split(", ")[1].split("%")[0]) > 95  # of the test images, right
    (file,) = r.CACHE.iterdir()
    written = file.stat().st_mtime_ns
    assert np.array_equal(features, r.classifier_features("digits", data, CPU)(data.test_x[:20]))
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:100])
    assert str(file) in refusal(capsys, *QUICK, "--out", tmp_path / "out")


# ---- data


def test_digits_are_all_there_once_about_160_test_images_a_task_and_limit_keeps_the_first_of_each_class():
    data = r.load_data("digits", Path())
    assert len(data.y) + len(data.test_y) == 1797
    assert (data.x.dtype, data.x.min(), data.x.max()) == (torch.uint8, 0, 255)
    assert all(150 <= len(task.test_y) <= 170 for task in r.split_tasks(data, 5))
    few = r.limit_classes(data, 3)
    assert few.y.tolist() == few.test_y.tolist() == [c for c in range(10) for _ in range(3)]
    assert all(few.x[few.y == c].equal(data.x[data.y == c][:3]) for c in range(10))


def test_tasks_hold_every_class_once_in_label_order(monkeypatch):
    y = torch.randint(20 * 50, (60000,), generator=generator())
    images = y[:, None].expand(-1, 4)  # an image shows its label
    monkeypatch.setitem(r.LOADERS, "any", (lambda _: r.Data(images, y, images[:20000], y[:20000]), ""))
    parts = r.split_tasks(r.load_data("any", Path()), 20)
    for k, part in enumerate(parts):
        for x, labels in ((part.x, part.y), (part.test_x, part.test_y)):
            assert sorted(set(labels.tolist())) == list(range(k * 50, (k + 1) * 50))
            assert torch.equal(x[:, 0], labels)
    assert [sum(len(part[i]) for part in parts) for i in range(4)] == [60000, 60000, 20000, 20000]
    assert parts[0].x.untyped_storage().data_ptr() == parts[1].x.untyped_storage().data_ptr()  # views


def write_idx(folder):
    """MNIST files in torchvision's layout, 600 and 100 images, the pixels counting up."""
    folder.mkdir(parents=True)
    for split, n in (("train", 600), ("t10k", 100)):
        head = b"".join(i.to_bytes(4, "big") for i in (0x803, n, 28, 28))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + bytes(i % 251 for i in range(784)) * n)
        head = b"".join(i.to_bytes(4, "big") for i in (0x801, n))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(head + bytes(range(10)) * (n // 10))


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_idx_files_are_read_and_padded_to_32(tmp_path, no_network, name, folder):
    write_idx(tmp_path / folder / "raw")
    data = r.load_data(name, tmp_path)
    assert (data.x.shape, data.test_x.shape) == ((600, 1, 32, 32), (100, 1, 32, 32))
    assert data.y.equal(torch.arange(10).repeat_interleave(60))
    assert data.test_y.equal(torch.arange(10).repeat_interleave(10))
    inside = data.x[5, 0, 2:30, 2:30].flatten().tolist()
    assert inside == [i % 251 for i in range(784)]
    assert data.x[5].sum() == sum(inside)


def write_cifar10(folder, monkeypatch):
    """CIFAR-10's pickles in small, their checksums known: a pixel holds its file's number, row and column."""
    folder.mkdir()
    files = {"batches.meta": {"label_names": ["any"] * 10}}
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], start=1):
        image = np.stack([np.full((32, 32), i), *np.indices((32, 32))]).astype(np.uint8)
        files[name] = {"data": image.reshape(1, 3072).repeat(20, 0), "labels": [*range(9, -1, -1)] * 2}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    md5 = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in files]
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5[0][1]}
    for name, value in {"train_list": md5[1:6], "test_list": md5[6:], "meta": meta}.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)


def test_cifar10_is_read_from_files_with_the_right_checksum_alone(tmp_path, no_network, monkeypatch, capsys):
    folder = tmp_path / torchvision.datasets.CIFAR10.base_folder
    write_cifar10(folder, monkeypatch)
    data = r.load_data("cifar10", tmp_path)
    assert (data.x.dtype, data.x.shape, data.test_x.shape) == (torch.uint8, (100, 3, 32, 32), (20, 3, 32, 32))
    assert data.y.tolist() == [c for c in range(10) for _ in range(10)]
    assert data.x[:10, 0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.x[7, 1:, 20, 30].tolist() == [20, 30]
    (folder / "data_batch_3").write_bytes((folder / "data_batch_2").read_bytes())
    assert "cifar-10-python.tar.gz" in refusal_of_data(capsys, "cifar10", tmp_path)


def write_npz(folder):
    """The downsampled ImageNet's files in small: an image's pixels hold its label, its row and its column."""
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"train_data_batch_{k}.npz" for k in range(1, 11)), "val_data.npz"]):
        labels = np.random.default_rng(i).permutation(np.arange(44) % 20) + 1
        images = np.zeros((44, 3, 32, 32), np.uint8)
        images[:, 0] = labels[:, None, None]
        images[:, 1:] = np.indices((32, 32))
        np.savez(folder / name, data=images.reshape(44, 3072), labels=labels)


def test_imagenet32_is_read_from_npz_files(tmp_path):
    write_npz(tmp_path / "imagenet32")
    data = r.load_data("imagenet32", tmp_path)
    assert (data.x.dtype, data.x.shape, data.test_x.shape) == (torch.uint8, (440, 3, 32, 32), (44, 3, 32, 32))
    for x, y in ((data.x, data.y), (data.test_x, data.test_y)):
        assert y.equal(y.sort().values)
        assert x[:, 0].eq(y[:, None, None] + 1).all()
        assert (x[:, 1:].numpy() == np.indices((32, 32))).all()
    assert [task.y.unique().tolist() for task in r.split_tasks(data, 20)] == [[k] for k in range(20)]


# ---- a whole run


def run_main(out, *argv):
    return r.main([*QUICK, "--out", str(out), *argv])


def read_result(folder):
    return json.loads((folder / "result.json").read_text())


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(flag, ..) is the folder of a whole run with these flags, made once for all tests."""

    @functools.cache
    def of(*argv):
        folder = tmp_path_factory.mktemp("finished")
        run_main(folder, *argv)
        return folder

    return of


@pytest.mark.slow
def test_a_run_from_the_command_line_leaves_its_results(tmp_path):
    command = [sys.executable, str(SCRIPT), *QUICK, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("digits-classifier") == 6  # the features of the FID, with every one that is told
    assert "task 5/5 rank1" in done.stderr

    result, log = read_result(tmp_path), read_log(tmp_path)
    assert (result["afid"], result["forgetting"]) == r.afid_and_forgetting(result["fid"])
    assert (result["dataset"], result["method"], result["seed"]) == ("digits", "rank1", 0)
    assert set(result["seconds"]) == {"replay", "train", "fisher", "fid"}
    assert result["script"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    assert min(result["fid_real"]) > 1  # of training images: of the test images themselves it would be 0
    assert [len(row) for row in result["drift"]] == [1, 2, 3, 4]  # of every old task, after tasks 2 to 5
    assert [line["task"] for line in log] == [1, 2, 3, 4, 5]
    r.UNet(1, 10, (8,), 1).load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    sizes = {f"samples-task{k}.png": (2 * k * 34 + 2, 10 * 34 + 2) for k in range(1, 6)}
    sizes["fid.png"] = (480, 840)
    for name, size in sizes.items():
        picture = torchvision.io.decode_image(str(tmp_path / name)).float()
        assert picture.shape[1:] == size
        assert picture.std() > 1
    files = {*sizes, "checkpoint.pt", "log.jsonl", "model.pt", "result.json", ".lock"}  # no partial.json
    assert set(contents(tmp_path)) == files


@pytest.mark.slow
@pytest.mark.parametrize("method", r.METHODS)
def test_each_methods_row_does_what_its_name_says(tmp_path, monkeypatch, method):
    joint, replays = method == "joint", method not in ("joint", "finetune", "diag-only", "rank1-only")
    distills, penalizes = replays and method != "replay", method.startswith(("diag", "rank"))
    learned, replayed, timesteps = [], [], []

    def see(_, cfg, state, task, replay):
        learned.append(task.y.unique().tolist())
        replayed.append(replay and replay[1].unique().tolist())

    spy(monkeypatch, r, "train_task", see)
    spy(monkeypatch, r, "fisher_batches", lambda _, *args: timesteps.append(args[-1]))
    result, log = run_main(tmp_path, "--method", method, "--fisher-timesteps=300,310"), read_log(tmp_path)
    assert bool(timesteps) == penalizes and all(of_one_fisher == [300, 310] for of_one_fisher in timesteps)
    assert learned == ([list(range(10))] if joint else [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])
    assert replayed == [list(range(2 * k)) if replays and k > 0 else None for k in range(len(learned))]
    assert [line["distill"] > 0 for line in log] == [k > 0 and distills for k in range(len(log))]
    assert [line["ewc"] > 0 for line in log] == [k > 0 and penalizes for k in range(len(log))]
    assert len(result["fisher"]) == len(result["drift"]) == 4 * penalizes
    assert (result["lam"] > 0) == penalizes
    assert [row.count(None) for row in result["fid"]] == ([0] if joint else [4, 3, 2, 1, 0])
    assert joint == (result["forgetting"] is None) == (result["fid_pooled"] is not None)


@pytest.mark.slow
def test_rank1_without_a_penalty_is_gd_to_the_last_digit(tmp_path):
    # lambda 0 is the baseline, and the Fisher's random draws change nobody else's.
    assert run_main(tmp_path / "a", "--lam", "0")["fid"] == run_main(tmp_path / "b", "--method", "gd")["fid"]


@pytest.mark.slow
def test_a_model_that_does_not_move_has_the_same_fid_after_every_task(tmp_path, monkeypatch):
    monkeypatch.setattr(r, "train_task", lambda *_: None)
    fid = run_main(tmp_path, "--method=finetune", "--dropout=0.5")["fid"]
    assert all(fid[j][k] == fid[k][k] for j in range(5) for k in range(j))


def test_an_epoch_takes_each_image_once_in_random_order_with_as_many_replayed_ones_each_with_its_own_label():
    x, y = (v[:40] for v in small_images(80))
    old_x, old_y = small_images(80)[0][40:], torch.arange(40) + 100  # no image, and no label, of the new ones
    batches = r.epoch_batches(settings(), r.State(None), r.Data(x, y, x, y), (old_x, old_y), 10)
    x0, _, _, labels = map(torch.stack, zip(*batches))  # (4, 20, ..)
    real, replayed = (r.to_uint8(part).flatten(0, 1) for part in (x0[:, :10], x0[:, 10:]))
    which = [int((x == image).flatten(1).all(1).nonzero()) for image in real]
    assert sorted(which) == list(range(40)) != which
    assert labels[:, :10].flatten().equal(y[which])
    which = [int((old_x == image).flatten(1).all(1).nonzero()) for image in replayed]
    assert labels[:, 10:].flatten().equal(old_y[which])
    assert len(set(which)) > 20


def test_with_ema_a_task_ends_with_the_average_of_its_weights(monkeypatch):
    cfg, data, path = settings(method="finetune", ema=0.9, epochs=2), r.load_data("digits", Path()), []
    state = r.new_state(cfg, data, CPU)
    spy(monkeypatch, r, "train_step", lambda *_: path.append(weights_of(state.model)))
    for task in r.split_tasks(data, 5)[:2]:
        r.begin_task(cfg, state)
        average, state.epoch = weights_of(state.model), 0
        path.clear()
        r.train_task(cfg, state, task, None)
        for weights in path:
            average = 0.9 * average + 0.1 * weights
        torch.testing.assert_close(weights_of(state.model), average, rtol=1e-4, atol=1e-6)


def test_training_leaves_the_weights_where_they_lie_in_memory_as_a_recorded_step_reads_them_there():
    cfg, data = settings(method="rank1", form="proximal", ema=0.9, epochs=2), r.load_data("digits", Path())
    state, task = r.new_state(cfg, data, CPU), r.split_tasks(data, 5)[1]
    theta, state.task = weights_of(state.model), 1
    state.penalty.add((torch.ones_like(theta), torch.tensor(2.0)), theta)
    r.begin_task(cfg, state)
    places = [p.data_ptr() for p in state.model.parameters()]
    r.train_task(cfg, state, task, (task.x, task.y))
    assert [p.data_ptr() for p in state.model.parameters()] == places
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(cfg.lr / state.step)  # it fell
    assert not weights_of(state.model).equal(theta)


@pytest.mark.slow
def test_a_stiff_proximal_step_keeps_the_weights_where_the_old_tasks_want_them(tmp_path):
    drift = run_main(tmp_path / "stiff", "--form=proximal", "--lam=1e9")["drift"]
    free = run_main(tmp_path / "free", "--form=proximal", "--lam=0")["drift"]
    for held, moved in zip(drift, free):
        assert max(map(abs, held)) < 0.01 * max(map(abs, moved))


def test_the_papers_settings_hold_but_for_a_datasets_row_then_small_then_limit_then_flags():
    cfg = r.parse_args(["--dataset=fashion"])
    assert (cfg.epochs, cfg.lam, cfg.lr, cfg.lr_decay, cfg.dropout) == (200, 15000, 2e-4, "none", 0)
    assert (cfg.batch_size, cfg.replay_per_class, cfg.sample_steps, cfg.tasks) == (128, 5000, 50, 5)
    cfg = r.parse_args(["--dataset=imagenet32"])
    assert (cfg.epochs, cfg.replay_per_class, cfg.tasks) == (100, 1300, 20)
    assert cfg.channels == [128, 256, 256, 256]
    cfg = r.parse_args(["--dataset=fashion", "--small", "--limit=50", "--epochs=3"])
    assert (cfg.channels, cfg.epochs) == ([16, 32, 32, 32], 3)
    assert (cfg.replay_per_class, cfg.fisher_samples) == (50, 100)
    assert cfg.out == Path("runs-small/fashion/rank1+seed=0")
    assert r.parse_args(["--small"]).epochs == r.parse_args([]).epochs  # the digits are small
    assert r.parse_args(["--limit=50", "--fisher-samples=7"]).fisher_samples == 7
    assert r.parse_args(["--limit=500"]).replay_per_class == 200  # no more than without it


def test_an_unfinished_file_never_takes_the_place_of_a_whole_one(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), r.whole(tmp_path / "file") as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file": b"old"}


def test_a_disk_that_fills_up_while_tensors_are_saved_is_an_error_of_that_file(tmp_path):
    with pytest.raises(OSError, match=r"model\.pt"), r.whole(tmp_path / "model.pt"):
        raise RuntimeError("unexpected pos")  # by torch.save
    assert contents(tmp_path) == {}


# ---- runs that survive

LONGER = ["--epochs=2", "--dropout=0.1"]


def interrupted(folder, what, nth, *argv):
    """A run with a checkpoint after every epoch, and Ctrl-C in the place of r.`what`'s nth call."""
    function, turns = getattr(r, what), itertools.count(1)

    def stops(*args):
        if next(turns) == nth:
            raise KeyboardInterrupt
        return function(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(r, "CHECKPOINT_SECONDS", -1)
        patch.setattr(r, what, stops)
        run_main(folder, *argv)
    assert stopped.value.code == 130
    assert not (folder / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "nth", "argv", "at"),
    [
        ("train_step", 7, "--dropout=0.1", "1 of 5 tasks and 0 epochs"),
        ("train_step", 11, "--dropout=0.1", "1 of 5 tasks and 1 epochs"),
        ("frechet_distance", 7, "--dropout=0.1", "1 of 5 tasks and 2 epochs"),
        ("write_json", 6, "--dropout=0.1", "5 of 5 tasks and 0 epochs"),  # all is done but the result
        ("train_step", 16, "--method=joint", "0 of 5 tasks and 1 epochs"),
        ("train_step", 11, "--method=diag-only", "1 of 5 tasks and 1 epochs"),
        ("train_step", 11, "--form=proximal --ema=0.9", "1 of 5 tasks and 1 epochs"),
    ],
)
def test_ctrl_c_prints_a_command_that_ends_the_run_the_same(tmp_path, finished, capsys, what, nth, argv, at):
    argv = ["--epochs=2", *argv.split()]
    interrupted(tmp_path, what, nth, *argv, "--fresh")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rank1_ewc: interrupted")
    r.main(shlex.split(last.split(": ")[-1])[2:])  # without --fresh, which would begin again
    assert f"{tmp_path / 'checkpoint.pt'}: {at}" in capsys.readouterr().out
    whole = finished(*argv)
    assert read_result(tmp_path) | {"seconds": None} == read_result(whole) | {"seconds": None}
    assert read_log(tmp_path) == read_log(whole)
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (tmp_path, whole)]
    torch.testing.assert_close(*models, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_that_is_not_finished_shows_what_it_has(tmp_path):
    interrupted(tmp_path, "train_step", 9)  # in the third task
    result = json.loads((tmp_path / "partial.json").read_text())
    assert len(result["fid"]) == len(result["afid"]) == 2
    assert result["forgetting"] is None
    assert {"fid.png", "samples-task2.png"} <= contents(tmp_path).keys()


@pytest.mark.slow
def test_a_folder_that_another_run_writes_into_is_refused_and_left_alone(tmp_path, finished, capsys):
    shutil.copytree(finished(*LONGER), tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    with filelock.FileLock(tmp_path / ".lock"):
        assert f"{tmp_path}" in refusal(capsys, *QUICK, *LONGER, "--fresh", "--out", tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_sigterm_ends_a_run_at_once_as_ctrl_c_does_with_its_own_status(tmp_path):
    command = [sys.executable, str(SCRIPT), *QUICK, "--epochs=100000", "--out", str(tmp_path)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "task 1/5" not in run.stderr.readline(40):
        pass
    run.terminate()
    printed = run.communicate(timeout=30)[1]
    assert run.returncode == 143
    assert shlex.join(command) in printed.splitlines()[-1]


def test_world_size_without_torchrun_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left over")
    show = "import rank1_ewc as r; print(r.WORLD, r.RANK)"
    done = subprocess.run([sys.executable, "-c", show], cwd=SCRIPT.parent, capture_output=True, check=True)
    assert done.stdout.split() == [b"1", b"0"]


def test_a_closed_stderr_and_a_stdout_that_takes_ascii_alone_end_no_run():
    show = "import rank1_ewc as r; print('\xb1'); r.tqdm.write('\xb1'); [*r.tqdm('abc', **r.BAR)]"
    command = f"PYTHONIOENCODING=ascii {shlex.quote(sys.executable)} -c {shlex.quote(show)} 2>&-"
    subprocess.run(command, shell=True, cwd=SCRIPT.parent, check=True)


@needs_cuda
def test_a_run_on_cuda_goes_on_after_an_interrupt(tmp_path):
    interrupted(tmp_path, "train_step", 11, *LONGER, "--device=cuda")
    assert len(run_main(tmp_path, *LONGER, "--device=cuda")["fid"]) == 5


@needs_cuda
@pytest.mark.parametrize(("form", "accumulate"), [("loss", 1), ("loss", 2), ("proximal", 1)])
def test_recorded_steps_are_the_same_as_others(form, accumulate):
    x, y = (v.cuda() for v in small_images(40))
    task, losses, weights = r.Data(x, y, x, y), [], []
    for recorded in (False, True):
        cfg = settings(device="cuda", accumulate=accumulate, form=form, cuda_graph=recorded)
        student, teacher = small_unet(dropout=0.1).cuda(), small_unet(seed=1).cuda().eval()
        theta, penalty = weights_of(student), r.LowRankPenalty(lam=3.0)
        penalty.add((torch.ones_like(theta), theta.new_tensor(2.0)), theta - 1e-4)
        state = r.State(student, torch.optim.Adam(student.parameters(), lr=1e-3), teacher, penalty, task=1)
        gradient_of, batches = r.gradient_function(cfg, state), r.epoch_batches(cfg, state, task, (x, y), 8)
        losses.append(torch.stack([r.train_step(cfg, state, batch, gradient_of) for batch in batches]))
        weights.append(weights_of(student))
    assert len(losses[0]) == 5
    assert torch.equal(*losses) and torch.equal(*weights)


@needs_cuda
def test_cuda_and_the_cpu_find_the_same_mean_gradient():
    model, batch = small_unet(channels=(16, 32, 32)).eval(), small_batch(20)
    mu = gradients_one_by_one(model, [batch]).mean(0)
    loss = r.per_sample_loss(model.cuda(), *(v.cuda() for v in batch)).mean()
    assert_close_to_its_largest(r.flat(torch.autograd.grad(loss, model.parameters())).cpu(), mu, 1e-3)


KILLS_ITSELF = """
import os, signal, sys, torch, rank1_ewc as r
r.CHECKPOINT_SECONDS, save, calls = -1, torch.save, []
def dies_in_the_middle_of_the_eighth(content, file):
    save(content, file)
    calls.append(file)
    if len(calls) == 8:
        file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dies_in_the_middle_of_the_eighth
r.main(sys.argv[1:])
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--no-python"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "status", "error"), [([], -signal.SIGKILL, 0), (TWO, 1, 0.01)])
def test_one_process_goes_on_where_one_or_two_were_killed(tmp_path, finished, launcher, status, error):
    argv = [*QUICK, "--epochs=2", "--out", str(tmp_path)]
    command = [*launcher, sys.executable, "-c", KILLS_ITSELF, *argv]
    killed = subprocess.run(command, cwd=SCRIPT.parent, check=False, capture_output=True)
    assert killed.returncode == status
    assert len(read_log(tmp_path)) == 5  # of seven checkpoints in three tasks, two were at a task's end
    expected = pytest.approx(read_result(finished("--epochs=2"))["afid"], rel=error)
    assert r.main(argv)["afid"] == expected


@pytest.mark.slow
def test_a_finished_run_given_again_prints_its_result_and_does_nothing(finished, monkeypatch, capsys):
    folder = finished(*LONGER)
    before = contents(folder)
    monkeypatch.setitem(r.LOADERS, "digits", None)  # not even the data is read
    result = run_main(folder, *LONGER)
    assert f"AFID {result['afid'][-1]:.2f}" in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.slow
def test_fresh_starts_over_another_seed_gives_another_result_and_the_old_one_does_not_outlive_it(tmp_path):
    first = run_main(tmp_path, "--seed=1")
    interrupted(tmp_path, "train_step", 2, "--seed=2", "--fresh")
    second = run_main(tmp_path, "--seed=2")
    assert (first["seed"], second["seed"]) == (1, 2)
    assert first["fid"] != second["fid"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoint.pt", "result.json"])
def test_a_file_of_other_settings_or_a_damaged_one_is_refused_and_kept(tmp_path, finished, capsys, file):
    whole = (finished(*LONGER) / file).read_bytes()
    cases = [(whole, "--lam=11", "--lam 10.0 11.0"), (whole, "--batch-size=32", "--batch-size 64 32")]
    cases += [(broken, "--lam=10", "damaged") for broken in (b"", b"{}", whole[: len(whole) // 2])]
    for written, flag, words in cases:
        (tmp_path / file).write_bytes(written)
        error = refusal(capsys, *QUICK, *LONGER, flag, "--out", tmp_path)
        assert all(word in error for word in [*words.split(), str(tmp_path / file), "--fresh"])
        assert contents(tmp_path)[file] == written


# ---- more than one process


def torchrun(nodes, *argv):
    """The exit status and output of two processes, of one machine or of two "machines" that are this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = ["--master_addr=localhost", f"--master_port={free.getsockname()[1]}"]
    command = [*TORCHRUN, f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}", *address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = [[*command, f"--node_rank={i}", str(SCRIPT), *argv] for i in range(nodes)]
    started = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        printed = "".join(process.communicate(timeout=200)[0] for process in started)
    finally:
        for process in started:
            process.terminate()  # of one that hangs: it ends its processes
    return max(process.returncode for process in started), printed


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "accumulate"), [(1, 2), (2, 1)])
def test_two_processes_on_one_machine_or_on_two_learn_what_one_learns(tmp_path, finished, nodes, accumulate):
    argv = [*QUICK, "--epochs=2", f"--accumulate={accumulate}", "--out", str(tmp_path)]
    status, printed = torchrun(nodes, *argv)
    assert status == 0, printed
    assert printed.count("AFID") == 2  # the table's, by rank 0 alone
    folders = tmp_path, finished("--epochs=2")
    (two, one), (ours, theirs) = map(read_result, folders), map(read_log, folders)
    assert (two["processes"], one["processes"]) == (2, 1)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for k in range(3):
        assert ours[k] == pytest.approx(theirs[k], rel=1e-3, abs=1e-5)
    assert two["fisher"][0]["c_star"] == pytest.approx(one["fisher"][0]["c_star"], rel=1e-4)
    assert two["fid_real"] == pytest.approx(one["fid_real"])
    assert two["afid"] == pytest.approx(one["afid"], rel=1e-2)
    assert contents(tmp_path).keys() == contents(folders[1]).keys()


def test_processes_that_do_not_see_the_same_files_are_stopped(capsys, monkeypatch, tmp_path):
    cfg = settings(out=tmp_path)
    state = r.new_state(cfg, r.load_data("digits", tmp_path), CPU)
    monkeypatch.setattr(r, "WORLD", 2)
    monkeypatch.setattr(r, "all_sum", lambda v: v + 1)  # the other process stands one task further
    with pytest.raises(SystemExit):
        r.load_checkpoint(cfg, state)
    assert "same files" in capsys.readouterr().err


# ---- the README's programs

BLOCKS = re.findall("```python\n(.*?)```", SCRIPT.with_name("README.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(BLOCKS)))
def test_the_readmes_programs_run_as_they_stand(monkeypatch, k):
    if "diffusers" in BLOCKS[k]:
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    for split, c, i in itertools.product(("train", "test"), "abcd", range(4)):
        path = Path("photos", split, c, f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        torchvision.io.write_png(torch.randint(256, (3, 50, 40)).to(torch.uint8), str(path))
    before = BLOCKS[:k] if "model" in BLOCKS[k] else []  # it goes on with the names of the first
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    subprocess.run([sys.executable, "-c", "".join([*before, BLOCKS[k]])], check=True)


# ---- what makes it fast


@needs_cuda
def test_a_norm_of_bfloat16_stays_in_it_under_autocast_and_is_right_to_its_rounding():
    norm, x = r.GroupNorm(2, 8).cuda(), torch.randn(3, 8, 5, 5, generator=generator()).cuda().bfloat16()
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.uniform_(norm.bias)
    with torch.autocast("cuda", torch.bfloat16):
        found = norm(x)
    exact = torch.nn.functional.group_norm(x.float(), 2, norm.weight, norm.bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0)


@pytest.mark.slow
def test_bf16_trains_and_samples_in_bfloat16_and_keeps_weights_and_fisher_in_float32(tmp_path, monkeypatch):
    seen = set()

    def see(eps, model, *_):
        seen.add((model.training, torch._C._functorch.maybe_current_level() is not None, eps.dtype))

    spy(monkeypatch, r.UNet, "forward", see)
    result = run_main(tmp_path, "--bf16", "--method=diag")
    assert all(math.isfinite(v) for v in result["afid"])
    assert {(True, False, torch.bfloat16), (False, False, torch.bfloat16)} <= seen
    assert {dtype for _, derivative, dtype in seen if derivative} == {torch.float32}
    assert {v.dtype for v in torch.load(tmp_path / "model.pt", weights_only=True).values()} == {torch.float32}


# ---- results/geometry.py: what a trained model says


def test_linear_alone_is_not_enough_for_rank_1():
    # With every entry of A free, the gradients (A x_t - eps) x_t^T share no direction.
    batches = r.fisher_batches(*small_images(size=4), 60, generator(3))
    first, second, *_ = geometry.geometry(AnyMatrix(16, 16, bias=False), batches)[0]["eigenvalues"]
    assert second > 0.2 * first


def test_the_geometry_from_the_gram_matrix_is_that_of_the_whole_matrix():
    model = AnyMatrix(16, 16, bias=False)
    batches = list(r.fisher_batches(*small_images(size=4), 12, generator(3)))
    numbers, mu, cos = geometry.geometry(model, batches)
    g = gradients_one_by_one(model, batches).numpy()  # (12, 256)
    F, mean, norm, length = g.T @ g / 12, g.mean(0), np.linalg.norm(g.mean(0)), np.linalg.norm(g, axis=1)
    values, vectors = np.linalg.eigh(F)
    top, trace, c_star = vectors[:, -1], np.trace(F), mean @ F @ mean / norm**4
    matrices = {"diagonal": np.diag(np.diag(F)), "mu mu^T": np.outer(mean, mean)}
    matrices["c* mu mu^T"] = c_star * np.outer(mean, mean)
    matrices["best of rank 1"] = values[-1] * np.outer(top, top)
    exact = {"c_star": c_star, "mu_norm": norm, "mu_noise": math.sqrt(trace / 12), "energy": c_star * norm**2}
    exact |= {"trace": trace, "eigenvalues": values[:-6:-1], "top_share": values[-1] / trace}
    exact |= {"cos_mu_top": abs(top @ mean) / norm, "cos_top": (abs(g @ top) / length).mean()}
    exact["error"] = {name: np.linalg.norm(F - A) / np.linalg.norm(F) for name, A in matrices.items()}
    assert numbers.keys() == exact.keys()
    for name, value in exact.items():
        assert numbers[name] == pytest.approx(value, rel=1e-3), name
    assert mu.numpy() == pytest.approx(mean, abs=1e-6, rel=1e-4)
    assert cos.numpy() == pytest.approx(abs(g @ mean) / length / norm, abs=1e-3)


def test_proposition_1_in_figure_1_the_best_denoiser_goes_from_the_image_to_the_mean_image_of_its_class():
    mean, std, y = [0.3, -0.5], 0.2, torch.arange(1000) % 2  # every pixel of class y is N(mean[y], std^2)
    noise = torch.randn(1000, 1, 4, 4, generator=generator())
    x = r.to_uint8(torch.tensor(mean)[y][:, None, None, None] + std * noise)
    numbers, _ = geometry.figure_1(gaussian_denoiser(mean, std), r.Data(x, y, x, y), None)
    abar, mean_image = r.alphas_cumprod(CPU)[numbers["t"]], (0.3**2 + 0.5**2) / 2
    low, high = ((abar * limit).tolist() for limit in (mean_image + std**2, mean_image))
    assert numbers["low noise"] == pytest.approx(low, rel=0.02)
    assert numbers["high noise"] == pytest.approx(high, rel=0.02)
    assert numbers["mse"][0] == pytest.approx(low[0], rel=0.02)
    assert numbers["mse"][-3:] == pytest.approx(high[-3:], rel=0.02)


def test_every_timestep_is_looked_at_with_the_same_images_and_the_same_noise():
    data = r.Data(*small_images(40), *small_images(40))
    x0, _, eps, y = map(torch.cat, zip(*geometry.samples(data, 300)))
    for t in (0, 500, 999):
        same_x0, times, same_eps, same_y = map(torch.cat, zip(*geometry.samples(data, 300, (t, t + 1))))
        assert all(a.equal(b) for a, b in ((x0, same_x0), (eps, same_eps), (y, same_y)))
        assert times.unique().tolist() == [t]


def test_a_vaes_loss_is_squared_error_and_weighted_divergence_from_a_normal_distribution():
    vae, (x0, eps) = geometry.VAE(16), torch.randn(2, 5, 1, 4, 4, generator=generator())
    image, mean, log_var = vae(x0.flatten(1), eps.flatten(1)[:, :8])
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = (image - x0.flatten(1)).square().mean(1) + 0.3 * kl
    torch.testing.assert_close(geometry.vae_loss(vae, x0, None, eps, None, kl_weight=0.3), expected)


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["1", "2", "3", "vae", "3 --first-task", "movement --first-task"])
def test_a_figure_of_a_run_or_of_its_first_task_is_numbers_and_a_picture(
    tmp_path, finished, monkeypatch, figure
):
    monkeypatch.setattr(r, "GRADIENTS", 20)
    monkeypatch.setattr(geometry, "TIMES", [100, 700])
    monkeypatch.setattr(geometry, "VAE_STEPS", [0, 5])
    run, to = finished(*LONGER), tmp_path / "new/figure"
    before = contents(run)
    geometry.main(
        [*figure.split(), " ".join(QUICK) if "--first-task" in figure else str(run), "--to", str(to)]
    )
    numbers = json.loads(to.with_suffix(".json").read_text())
    assert numbers["samples"] == (200 if "movement" in figure else 20)
    assert (numbers["config"]["method"], numbers["config"]["channels"]) == ("rank1", [8])
    assert torchvision.io.decode_image(str(to.with_suffix(".png"))).float().std() > 1
    if figure == "3":
        last_row = to.with_suffix(".md").read_text().splitlines()[-1].split("|")
        assert last_row[2].strip() == f"{numbers['all timesteps']['c_star']:.2g}"
    assert contents(run) == before


# ---- results/report.py: what finished runs say together


def hand_made_run(folder, method, seed, afid, forgetting, **other):
    """A result.json of two tasks, of no real run; `other`: parts of it, or settings."""
    joint = method == "joint"
    run = {"dataset": "fashion", "method": method, "lam": 0.0, "seed": seed, "fid_features": "inception"}
    run["fid"] = [[afid, afid]] if joint else [[5.0, None], [afid + forgetting, afid - forgetting]]
    run["afid"] = [afid] if joint else [5.0, afid]
    run |= {
        "forgetting": forgetting,
        "fid_real": [1.0, 1.0],
        "fisher": [],
        "fid_pooled": None,
        "script": "0123",
    }
    run |= {name: value for name, value in other.items() if name in run}
    run["config"] = {name: value for name, value in other.items() if name not in run}
    r.write_json(folder / "result.json", run)


def test_table_1_has_means_errors_and_the_papers_numbers(tmp_path, capsys):
    for seed, afid in enumerate((20.0, 26.0)):
        hand_made_run(tmp_path / f"gd{seed}", "gd", seed, afid, 2.0)
    hand_made_run(tmp_path / "ema", "gd", 0, 21.0, 2.0, ema=0.99, script="cdef")
    hand_made_run(tmp_path / "joint", "joint", 0, 7.0, None, fid_pooled=6.0)
    fisher = [{"energy": 1.0}, {"energy": 2.0}]
    hand_made_run(tmp_path / "rank1", "rank1", 0, 18.0, 1.0, lam=10.0, fisher=fisher)
    report.main([str(tmp_path)])
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "table1.csv").read_text().splitlines())}
    numbers = [float(rows["gd"][name]) for name in ("AFID", "AFID s.e.", "forgetting")]
    assert numbers == pytest.approx([23, 3, 2])
    assert (rows["joint"]["pooled FID"], rows["joint"]["forgetting"]) == ("6.0", "")
    assert (rows["rank1"]["curvature"], rows["diag"]["seeds"]) == ("15.0", "0")
    assert rows["diag-only"]["paper: AFID / forgetting"] == "99.9 / 81.7 *"
    assert "gd --ema 0.99" in rows
    assert "rank4" not in rows  # not the paper's: only where there are runs
    text = (tmp_path / "table1.md").read_text()
    assert text in capsys.readouterr().out
    for words in (
        "23.0 ± 3.0",
        "ema 0.99 (paper 0)",
        "real training images have 1.0",
        "0123 (4 runs)",
        "cdef (1 runs)",
        "run: mnist, cifar10",
    ):
        assert words in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"figure4.png", "figure5-fashion.png"}


def test_runs_on_different_features_stay_apart_in_one_report(tmp_path):
    for features, afid in (("inception", 20.0), ("fashion-classifier", 200.0)):
        for method, add in (("gd", 0), ("rank1", afid / 10)):
            folder = tmp_path / features / method
            hand_made_run(folder, method, 0, afid + add, 2.0, lam=10.0, fid_features=features)
    report.main([str(tmp_path)])
    rows = [line.split("|") for line in (tmp_path / "summary.md").read_text().splitlines()[2:]]
    found = {(row[1].strip(), row[2].strip()): row[7].strip() for row in rows}
    expected = {"fashion (inception)": "+2.00", "fashion (fashion-classifier)": "+20.00"}
    assert {name: found[name, "rank1"] for name in expected} == expected
    assert len([*tmp_path.glob("figure5-*.png")]) == 2


def test_a_paired_difference_has_the_interval_of_a_paired_t_test(tmp_path):
    gd, rank1 = [20.0, 26.0, 22.0], [18.5, 25.0, 23.0]
    for seed in range(3):
        hand_made_run(tmp_path / f"gd{seed}", "gd", seed, gd[seed], 2.0)
        hand_made_run(tmp_path / f"rank1{seed}", "rank1", seed, rank1[seed], 2.0, lam=10.0)
    report.main([str(tmp_path)])
    row = next(csv.DictReader((tmp_path / "paired.csv").read_text().splitlines()))
    assert [row[name] for name in ("method", "against", "measure", "seeds")] == ["rank1", "gd", "AFID", "3"]
    interval = scipy.stats.ttest_rel(rank1, gd).confidence_interval(0.95)
    assert [float(row[name]) for name in ("mean", "low", "high")] == pytest.approx([-0.5, *interval])


def test_the_baseline_of_a_run_is_gd_alone_and_of_gd_with_a_flag_gd_without_it(tmp_path):
    small = {name: value for name, value in r.SMALL.items() if name not in ("lam", "fid")}
    rows = {
        "small": small,
        "small ema": small | {"lr": 2e-3, "lr_decay": "none", "ema": 0.9},
        "gd": {},
        "ema": {"ema": 0.9},
        "pool": {"replay_per_class": 10},
        "both": {"ema": 0.9, "replay_per_class": 10},
        "rank1": {"method": "rank1", "lam": 10.0},
        "rank1 ema": {"method": "rank1", "lam": 10.0, "ema": 0.9},
        "rank1 epochs": {"method": "rank1", "lam": 10.0, "epochs": 7},
        "seed": {"method": "rank1", "lam": 10.0, "seed": 1},
    }
    for name, other in rows.items():
        usual = {"method": "gd", "seed": 0, "afid": 20.0, "forgetting": 2.0}
        hand_made_run(tmp_path / name, **usual | other)
    runs = {name: report.read_run(tmp_path / name) for name in rows}
    found = {name: report.baseline(run, runs.values()) for name, run in runs.items()}
    found = {name: gd["folder"].name for name, gd in found.items() if gd}
    # Of "both" it could be ema or pool.
    assert found == {"small ema": "small", "ema": "gd", "pool": "gd", "rank1": "gd", "rank1 ema": "ema"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"method": "rank1", "epochs": 2}, "do not belong in one table|--epochs 1 and 2"),
        ({}, "/a and|/b are the same row and seed"),
        ({"method": "gdd"}, "/b/result.json|gdd"),
        ({"seed": 1, "fid": [[5.0, None]]}, "/b/result.json|damaged or lacks parts"),
    ],
)
def test_runs_that_belong_in_no_table_are_refused_in_one_line(tmp_path, capsys, other, words):
    usual = {"method": "gd", "seed": 0, "afid": 20.0, "forgetting": 2.0, "epochs": 1}
    hand_made_run(tmp_path / "a", **usual)
    hand_made_run(tmp_path / "b", **usual | other)
    error = refusal(capsys, tmp_path, main=report.main)
    assert all(word in error for word in words.split("|"))


def test_a_comparison_has_the_means_over_a_setting_and_the_differences_from_gd(tmp_path):
    for seed, afid in enumerate((20.0, 26.0)):
        hand_made_run(tmp_path / f"gd{seed}", "gd", seed, afid, 2.0)
        for lam in (10.0, 100.0, 1000.0):
            hand_made_run(tmp_path / f"rank1-{lam}-{seed}", "rank1", seed, afid + lam / 100, 2.0, lam=lam)
    runs = [str(folder) for folder in tmp_path.iterdir()]
    report.main([*runs, "--over", "lam", "--to", str(tmp_path / "new" / "lambda")])
    content = json.loads((tmp_path / "new" / "lambda.json").read_text())
    afid = {(row["line"], row["lam"]): [row["AFID"], row["AFID s.e."]] for row in content["rows"]}
    assert afid.keys() == {("gd", None), ("rank1", 10), ("rank1", 100), ("rank1", 1000)}
    assert afid["rank1", 1000] == pytest.approx([33, 3])
    means = {(row["lam"], row["measure"]): row["mean"] for row in content["paired"]}
    assert [means[10, "AFID"], means[1000, "AFID"], means[10, "forgetting"]] == pytest.approx([0.1, 10, 0])
    assert (tmp_path / "new" / "lambda.png").stat().st_size > 10_000


def test_a_comparison_can_be_with_the_runs_of_another_row_than_gd(tmp_path, capsys):
    afids = {"gd": (10.0, 10.0), "rank1": (20.0, 21.0), "rank1-eig": (21.0, 24.0)}
    runs = {method: [tmp_path / f"{method}-{seed}" for seed in (0, 1)] for method in afids}
    for method, folders in runs.items():
        for seed, folder in enumerate(folders):
            hand_made_run(folder, method, seed, afids[method][seed], 2.0)
    command = [*runs["rank1-eig"], "--over", "lam", "--to", tmp_path / "direct", "--against", *runs["rank1"]]
    report.main([*map(str, command)])
    afid, *_ = json.loads((tmp_path / "direct.json").read_text())["paired"]
    assert (afid["measure"], afid["against"].split()[0], afid["seeds"]) == ("AFID", "rank1", 2)
    # Of the differences 1 and 3 the standard error is 1, and Student's t of one degree of freedom 12.706.
    assert [afid["mean"], afid["low"], afid["high"]] == pytest.approx([2, 2 - 12.706, 2 + 12.706], abs=1e-3)
    assert "--against" in refusal(capsys, *command, *runs["gd"], main=report.main)


def test_drift_is_told_along_unit_vectors_of_all_directions_of_a_task():
    run = {"fisher": [{"mu_norm": 2.0}, {"mu_norm": 0.5}], "drift": [[9.0, 9.0], [4.0, -4.0, 1.0, 1.0]]}
    assert report.mean_drift([run]) == "2.0e+00"


def test_c_star_and_the_norm_of_mu_are_told_from_the_smallest_to_the_largest_where_there_is_a_mu():
    fisher = [{"c_star": 128.0, "mu_norm": 2.0}, {"c_star": 14.04, "mu_norm": 0.5}]
    spans = {"c*": "14 to 130", "norm of mu": "0.5 to 2"}
    assert report.span_of_mu([{"method": "rank1", "fisher": fisher}]) == spans
    assert report.span_of_mu([{"method": "rank4", "fisher": fisher}]) == dict.fromkeys(spans)


def test_a_text_includes_the_tables_as_their_files_now_are(tmp_path):
    Path("table.md").write_text("| new |\n")
    text = "before\n<!-- include: table.md -->\n{}<!-- end -->\nafter\n"
    (tmp_path / "README.md").write_text(2 * text.format("| old |\n"))
    report.main(["--include", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == 2 * text.format("| new |\n")


@pytest.mark.slow
def test_bench_does_the_same_work_both_ways(tmp_path):
    lines = bench.main(["--quick", "--to", str(tmp_path / "bench.json")])
    assert len(lines) == 7
    for name, line in lines.items():
        assert line["difference"] <= (line["same to"] or 0.05), name  # 0.05: in bfloat16, on a GPU
    assert (tmp_path / "bench.json").exists()


# ---- bad input: one line on stderr that says what to do, status 2, before any training


def refusal(capsys, *argv, main=r.main):
    """The one line that the command line is refused with."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, argv)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    return error


def refusal_of_data(capsys, name, folder):
    return refusal(capsys, "--dataset", name, "--data-dir", folder, "--out", folder / "out")


WRONG = "--dataset=digit --fid=vgg --device=tpu --device=cuda:99 --frobnicate --seed=-1 --lam=-1 --lam=inf"
WRONG += " --lam=many --lr=0 --dropout=1 --ema=1 --limit=1 --epochs=0 --epochs=1.5 --epochs=1000000000000"
WRONG += " --channels=0 --channels=32;64"


@pytest.mark.parametrize("wrong", WRONG.split())
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(capsys, wrong):
    error = refusal(capsys, wrong)
    assert all(word in error for word in wrong.split("="))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--method rank3", "--method rank3 gd diag rank1"),
        ("--lam nan", "--lam nan from 0"),
        ("--sample-steps 1001", "--sample-steps 1001 to 1000"),
        ("--tasks 3", "--tasks 3 10 divisor"),
        ("--channels 8,12", "--channels multiples of 8"),
        ("--channels 8,8,8,8", "--channels levels 8x8"),
        ("--fisher-timesteps 300,200", "--fisher-timesteps 0,1000"),
        ("--batch-size 10 --accumulate 3", "--batch-size 10 3"),
        ("--method gd --form proximal", "--form proximal rank"),
        ("--out /dev/null/out", "/dev/null/out written"),
        ("--lr 1e12", "task 1 finite epoch --lr 1e+12 --lam"),
    ],
)
def test_a_refusal_says_what_would_do(capsys, argv, words):
    error = refusal(capsys, *argv.split())
    assert all(word in error for word in words.split())


@pytest.mark.parametrize("row", ["mnist MNIST/raw", "cifar10 cifar-10-python", "imagenet32 batch_1.npz"])
def test_missing_data_is_refused_with_what_to_put_where(capsys, tmp_path, no_network, row):
    name, file = row.split()
    error = refusal_of_data(capsys, name, tmp_path)
    assert all(word in error for word in (file, str(tmp_path), "--data-dir"))


PIXELS, LABELS = np.zeros((44, 3072), np.uint8), np.arange(44) % 20 + 1


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"data": PIXELS}, "train_data_batch_7.npz labels"),
        ({"data": PIXELS[:, :3000], "labels": LABELS}, "train_data_batch_7.npz 3000 3072"),
        ({"data": PIXELS.astype(float), "labels": LABELS}, "train_data_batch_7.npz uint8"),
        ({"data": PIXELS, "labels": np.array([{}] * 44)}, "train_data_batch_7.npz allow_pickle=False"),
        ({"data": PIXELS, "labels": np.arange(44) + 1}, "lacks images"),
        (None, "train_data_batch_7.npz damaged"),
    ],
)
def test_an_imagenet_file_of_another_form_is_refused(capsys, tmp_path, arrays, words):
    write_npz(tmp_path / "imagenet32")
    path = tmp_path / "imagenet32/train_data_batch_7.npz"
    np.savez(path, **arrays) if arrays else path.write_bytes(path.read_bytes()[:5000])
    error = refusal_of_data(capsys, "imagenet32", tmp_path)
    assert all(word in error for word in words.split())


@pytest.mark.parametrize(("file", "at"), [("t10k-labels-idx1-ubyte", 9), ("train-images-idx3-ubyte", 2)])
def test_an_idx_file_with_a_wrong_label_or_type_is_refused(capsys, tmp_path, no_network, file, at):
    write_idx(tmp_path / "MNIST/raw")
    path = tmp_path / "MNIST/raw" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + b"M" + whole[at + 1 :])
    error = refusal_of_data(capsys, "mnist", tmp_path)
    assert "mnist" in error.lower()
    assert str(tmp_path) in error


def test_without_inceptions_weights_a_refusal_names_the_classifier(capsys, tmp_path, no_network, monkeypatch):
    monkeypatch.setattr(r.cleanfid.features.InceptionV3W, "__init__", urllib.request.urlopen)
    assert "--fid classifier" in refusal(capsys, "--fid", "inception", "--out", tmp_path)
