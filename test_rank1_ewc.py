"""The claims of rank1_ewc.py and of results/, a test each; the oracle is the slow, obvious way.

They follow the three parts of the script, then results/ and bad input. `slow` are those that start processes or
train whole runs on the digits: `pytest -m "not slow"` checks everything else in well under a minute.
"""

import copy
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import cleanfid.features
import cleanfid.fid
import filelock
import numpy as np
import pytest
import scipy.stats
import torch
import torchvision

import rank1_ewc as r
from results import bench, beyond, geometry, report

SCRIPT = Path(r.__file__)
CPU = torch.device("cpu")
QUICK = ["--channels=8", "--epochs=1", "--sample-steps=2", "--replay-per-class=3", "--fisher-samples=200"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
torch.set_num_threads(1)  # these networks are too small to share out, and a busy machine makes it very slow


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path_factory):
    """Away from the user's runs and cache; the classifier of the digits is trained once for all tests."""
    torch.manual_seed(0)
    monkeypatch.setattr(r, "QUIET", True)
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def spy(monkeypatch, owner, name, see):
    """After every call of owner.name comes see(what it returned, *its arguments)."""
    function = getattr(owner, name)

    def seen(*args, **options):
        out = function(*args, **options)
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
    return r.flat(r.trainable(model)).detach().clone()


def settings(**changed):
    """Settings as parse_args and set_up make them, on the CPU."""
    cfg = vars(r.parse_args(QUICK)) | {"device": "cpu", "bf16": False, "cuda_graph": False}
    return r.Settings(**cfg | changed)


def assert_close_to_its_largest(ours, exact, error):
    """No entry is off by more than this share of the largest."""
    torch.testing.assert_close(ours.double(), exact.double(), atol=error * float(exact.abs().max()), rtol=0)


# ---- Part I: diffusion


def test_add_noise_has_the_mean_and_variance_of_the_forward_process():
    betas = np.linspace(1e-4, 0.02, 1000)
    x0, eps = torch.full((1, 1, 400, 400), 0.7), torch.randn(1, 1, 400, 400, generator=generator())
    for t in (0, 300, 999):
        abar = math.prod(1 - betas[: t + 1])
        x_t = r.add_noise(x0, torch.tensor([t]), eps)
        assert x_t.mean().item() == pytest.approx(math.sqrt(abar) * 0.7, abs=0.01)
        assert x_t.var().item() == pytest.approx(1 - abar, rel=0.02, abs=1e-6)


def test_timesteps_are_drawn_from_all_1000_and_noise_from_a_normal_distribution():
    t, eps = r.draw_noise(torch.zeros(20_000, 1, 2, 2), generator())
    assert t.bincount(minlength=1000).gt(0).all() and len(t.bincount()) == 1000
    assert (eps.mean().item(), eps.std().item()) == pytest.approx((0, 1), abs=0.02)


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


def test_ddim_and_diffusers_scheduler_generate_the_same_images():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model, scheduler = small_unet().eval(), diffusers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(50)
    x = noise = torch.randn(4, 1, 8, 8, generator=generator())
    y = torch.arange(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(4), y), t, x).prev_sample
    torch.testing.assert_close(r.ddim_sample(model, noise, y, 50), x, atol=1e-3, rtol=0)


def two_channels(x, t, y):
    return torch.cat([x, x], 1)


def test_a_prediction_that_would_broadcast_is_refused_wherever_a_model_is_called():
    x0, t, eps, y = small_batch()
    calls = [
        lambda: r.per_sample_loss(two_channels, x0, t, eps, y),
        lambda: r.ddim_sample(two_channels, eps, y, 2),
    ]
    calls += [lambda: r.losses(two_channels, None, x0, t, eps, y)]
    calls += [lambda: r.losses(small_unet(), two_channels, x0, t, eps, y)]
    calls += [
        lambda: r.per_sample_loss(
            small_unet(), x0.expand(-1, 3, -1, -1)[:, :1], t, eps.expand(-1, 3, -1, -1), y
        )
    ]
    for call in calls[:-1]:
        with pytest.raises(ValueError, match="must give eps like x_t"):
            call()
    with pytest.raises((ValueError, RuntimeError)):
        calls[-1]()


# ---- Part I: generative distillation


class Greys(torch.nn.Linear):
    """Its eps leads to an image as grey as the class says, whatever the noise."""

    def forward(self, x, t, y):
        return gaussian_denoiser([-0.5, -0.3, -0.1, 0.1], std=0)(x, t, y)


def test_replay_pool_holds_equally_many_images_of_every_old_class_always_from_the_same_noise(monkeypatch):
    starts, steps, grey = [], set(), torch.tensor([64, 89, 115, 140])  # 127.5 (mean + 1)
    spy(monkeypatch, r, "ddim_sample", lambda x0, model, noise, y, n: starts.append(noise) or steps.add(n))
    for num_old in (2, 4):
        cfg = settings(replay_per_class=70, replay_steps=num_old)
        x, y = r.replay_pool(cfg, Greys(1, 1), (1, 8, 8), num_old)
        assert (x.dtype, x.shape) == (torch.uint8, (70 * num_old, 1, 8, 8))
        assert y.equal(torch.arange(num_old).repeat_interleave(70))  # class after class
        assert (x.float() - grey[y][:, None, None, None]).abs().max() <= 1
    noise = torch.cat(starts).view(2 + 4, 70, 1, 8, 8)  # the n-th image's, whatever the class and the task
    assert all(noise[k].equal(noise[0]) for k in range(6))
    assert len(noise[0].unique(dim=0)) == 70
    assert steps == {2, 4}


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
        assert_close_to_its_largest(gradients[0], gradients[1], 1e-3)
    denoise, distill = r.losses(student, None, x0, t, eps, y)  # without a teacher all rows are real
    torch.testing.assert_close(denoise, ((ours - eps) ** 2).mean())
    assert distill == 0


# ---- Part I: the Fisher


def gradients_one_by_one(model, batches, loss=None):
    """g_i (n, D) in float64, a backward pass per sample; of the paper's loss, written out, or of `loss`."""
    abar, g = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0), []
    for batch in batches:
        for x0, t, eps, y in zip(*batch):
            if loss is None:
                x_t = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
                value = ((model(x_t[None], t[None], y[None])[0] - eps) ** 2).mean()
            else:
                value = loss(model, x0[None], t[None], eps[None], y[None])[0]
            parts = torch.autograd.grad(value, r.trainable(model), materialize_grads=True)
            g.append(r.flat(parts))
    return torch.stack(g).double()


def rank1_one_by_one(model, x, y, n, seed=3, loss=None):
    """mu and c* from the gradients of single samples: mu's draws, then as many fresh ones."""
    draws = generator(seed)
    g, fresh = (gradients_one_by_one(model, list(r.fisher_batches(x, y, n, draws)), loss) for _ in range(2))
    mu = g.mean(0)
    return mu, float((fresh @ mu).square().mean() / mu.norm() ** 4), g, fresh


@pytest.mark.parametrize("n", [10, 40, 4000])
def test_fisher_samples_take_every_image_equally_often_with_its_label_at_random_timesteps(n):
    images, labels = small_images(40)
    labels = labels.sort().values  # class after class, as the data is held
    x0, t, eps, y = (torch.cat(v) for v in zip(*r.fisher_batches(images, labels, n, generator())))
    which = [int((r.to_float(images) == x).flatten(1).all(1).nonzero()) for x in x0]
    assert labels[which].equal(y)
    assert set(np.bincount(which, minlength=40)) == {n // 40} if n >= 40 else len(set(which)) == n
    assert which != sorted(which)
    assert t.min() < 1000 / n**0.5 < 1000 - 1000 / n**0.5 < t.max()
    assert eps.mean().abs() < 0.1


@pytest.mark.parametrize("n", [6, 10, 150])  # each image once, some twice, and more than one batch
def test_mu_and_c_star_match_per_sample_gradients_c_star_over_fresh_draws(n):
    model = small_unet(dropout=0.5).eval()
    exact_mu, exact_c_star, *_ = rank1_one_by_one(model, *small_images(), n)
    mu, c_star = r.rank1_fisher(model.train(), *small_images(), n, generator(3))
    assert_close_to_its_largest(mu, exact_mu, 1e-3)
    assert float(c_star) == pytest.approx(exact_c_star, rel=1e-3)


def test_diagonal_fisher_matches_per_sample_gradients():
    model = small_unet(dropout=0.5).eval()
    *_, g, _ = rank1_one_by_one(model, *small_images(), 10)
    diagonal = r.diagonal_fisher(model.train(), *small_images(), 10, generator(3))
    assert_close_to_its_largest(diagonal, g.square().mean(0), 1e-3)


class Denoiser(torch.nn.Module):
    """A network as a researcher may have it; `kind` says what is special about it."""

    def __init__(self, kind=""):
        super().__init__()
        torch.manual_seed(0)
        self.kind, wide = kind, kind == "self-conditioning"
        self.classes = torch.nn.Embedding(10, 16, sparse=kind == "sparse embedding")
        self.net, self.out = torch.nn.Linear(81 + 64 * wide, 64), torch.nn.LSTM(8, 8, batch_first=True)
        if kind == "weight norm":
            self.net = torch.nn.utils.parametrizations.weight_norm(self.net)
        self.norm = torch.nn.BatchNorm1d(64, track_running_stats=kind != "batch norm over the batch")
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("mean", torch.zeros(()))
        self.kept = []

    def forward(self, x, t, y):
        h = torch.cat([x.flatten(1), self.classes(y), t[:, None] / 1000], 1)
        if self.kind == "self-conditioning":
            with torch.no_grad():
                guess = torch.tanh(self.net(torch.cat([h, torch.zeros_like(x.flatten(1))], 1)))
            h = torch.cat([h, guess], 1)
        h = torch.tanh(self.net(h))
        if self.kind == "keeps features":
            self.features = h
            self.kept.append(h)
            self.mean = h.mean().detach()
        if self.kind.startswith("batch norm"):
            h = self.norm(h)
        if self.kind == "mixes samples":
            h = h - h.mean(0)
        if self.kind == "random":
            h = h * torch.rand_like(h)
        if self.kind == "rounded":
            h = RoundedWithABackwardOfItsOwn.apply(h)
        h = h.view(-1, 8, 8)
        if self.kind == "LSTM":
            h = self.out(h)[0]
        if self.kind == "attention":
            h = self.attention(h, h, h)[0]
        return h[:, None]


class RoundedWithABackwardOfItsOwn(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.detach() * 2  # a second derivative is lost here


KINDS = ["", "self-conditioning", "sparse embedding", "weight norm", "batch norm", "LSTM", "attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_is_that_of_single_backward_passes_for_networks_as_researchers_have_them(kind):
    model, (x, y) = Denoiser(kind).eval(), small_images(20)
    exact_mu, exact_c_star, g, _ = rank1_one_by_one(model, x, y, 20)
    mu, c_star = r.rank1_fisher(model, x, y, 20, generator(3))
    assert_close_to_its_largest(mu, exact_mu, 1e-4)
    assert float(c_star) == pytest.approx(exact_c_star, rel=1e-3)
    if kind != "sparse embedding":  # of which single gradients cannot be batched
        diagonal = r.diagonal_fisher(model, x, y, 20, generator(3))
        assert_close_to_its_largest(diagonal, g.square().mean(0), 1e-3)


def cross_entropy(predict, x0, t, eps, y):
    return torch.nn.functional.cross_entropy(predict(x0), y, reduction="none")


def against_its_own_prediction(model, x0, t, eps, y):
    with torch.no_grad():
        target = model(x0, t, y) / 2
    return (model(x0, t, y) - target).square().flatten(1).mean(1)


def test_the_fishers_take_any_loss_of_single_samples_and_floats_as_they_are():
    features, y = torch.randn(12, 5, generator=generator()), torch.arange(12) % 3
    classifier = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    images = r.to_float(small_images(12)[0])
    cases = (classifier, features, cross_entropy), (Denoiser(), images, against_its_own_prediction)
    for model, x, loss in cases:
        exact_mu, exact_c_star, g, _ = rank1_one_by_one(model, x, y, 12, loss=loss)
        mu, c_star = r.rank1_fisher(model, x, y, 12, generator(3), loss=loss)
        assert_close_to_its_largest(mu, exact_mu, 1e-4)
        assert float(c_star) == pytest.approx(exact_c_star, rel=1e-3)
        diagonal = r.diagonal_fisher(model, x, y, 12, generator(3), loss=loss)
        assert_close_to_its_largest(diagonal, g.square().mean(0), 1e-4)


def test_the_fisher_is_of_the_trainable_weights_alone():
    model, (x, y) = Denoiser(), small_images()
    whole, _ = r.rank1_fisher(model, x, y, 6, generator(3))
    names = [name for name, _ in model.named_parameters()]
    parts = dict(zip(names, r.shaped(whole, [*model.parameters()])))
    model.classes.requires_grad_(False)  # as with LoRA most weights are
    mu, c_star = r.rank1_fisher(model, x, y, 6, generator(3))
    torch.testing.assert_close(mu, r.flat(v for name, v in parts.items() if name != "classes.weight"))
    assert r.diagonal_fisher(model, x, y, 6, generator(3)).shape == mu.shape
    penalty = r.Rank1Penalty(1.0)
    penalty.add((mu, c_star), model)
    assert penalty(model) == 0


def test_mu_and_c_star_of_diffusers_network_are_those_of_ours():
    ours, theirs = ours_and_diffusers((16, 32), 1)
    found = [r.rank1_fisher(model, *small_images(), 6, generator()) for model in (ours, theirs)]
    weights = dict(ours.named_parameters())
    mu = dict(zip(weights, r.shaped(found[0][0], [*weights.values()])))
    in_their_order = r.flat(mu[name] for name, _ in theirs.named_parameters())
    assert_close_to_its_largest(in_their_order, found[1][0], 1e-3)
    assert float(found[0][1]) == pytest.approx(float(found[1][1]), rel=1e-3)


FISHERS = [r.rank1_fisher, r.diagonal_fisher]


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_fisher_leaves_the_model_as_it_was(fisher):
    model, hooks = Denoiser("keeps features").train(), []
    model.net.eval()
    handle = model.register_forward_hook(lambda *_: hooks.append(1))
    before, buffer = copy.deepcopy(model.state_dict()), model.mean
    fisher(model, *small_images(), 6, generator())
    assert (model.training, model.net.training, model.norm.training) == (True, False, True)
    assert model.mean is buffer
    assert not hasattr(model, "features")
    assert model.kept == []
    assert all(p.grad is None for p in model.parameters())
    copy.deepcopy(model)
    assert all(v.equal(before[name]) for name, v in model.state_dict().items())
    handle.remove()
    assert not model._forward_hooks


WRONG_NETWORKS = [
    ("batch norm over the batch", "cannot be taken: .* 1 value per channel"),
    ("mixes samples", "mixes samples"),
]
WRONG_NETWORKS += [("random", "draws at random"), ("rounded", "appears to not have been used")]


@pytest.mark.parametrize(("kind", "words"), WRONG_NETWORKS)
def test_a_network_for_which_c_star_would_be_wrong_is_refused(kind, words):
    with pytest.raises(ValueError, match=words):
        r.rank1_fisher(Denoiser(kind), *small_images(20), 20, generator())


@pytest.mark.parametrize("fisher", FISHERS)
def test_images_have_one_conversion_and_what_it_does_not_take_is_refused(fisher):
    model, (images, y) = Denoiser(), small_images(20)
    found = [fisher(model, x, y, 20, generator(3)) for x in (images, r.to_float(images))]
    torch.testing.assert_close(*found)
    for wrong in (
        images.long(),
        images.float(),
        images / 255,
        images.float() / 100,
        r.to_float(images) * math.nan,
    ):
        for call in (lambda x: fisher(model, x, y, 20, generator(3)), r.to_float):  # to_float is training's
            with pytest.raises(ValueError, match="must be uint8 in 0..255, or floats in -1..1"):
                call(wrong)


def frozen(model):
    return model.requires_grad_(False)


def with_one_broken_class(model):
    model.class_embedding.weight.data[4] = math.nan
    return model


@pytest.mark.parametrize("fisher", FISHERS)
def test_what_no_fisher_can_be_taken_of_is_refused_and_the_reason_said(fisher):
    x, y = small_images()
    cases = [(frozen(small_unet()), x, 6, {}, "trainable weights: all are frozen")]
    cases += [(with_one_broken_class(small_unet()), x, 6, {}, "not finite.*class 4, timestep")]
    not_of_each = {"loss": lambda *batch: r.per_sample_loss(*batch).mean()}
    cases += [(small_unet(), x, 6, not_of_each, "a number for each sample")]
    cases += [(small_unet(), images, n, {}, "cannot take") for n, images in ((0, x), (6, x[:0]), (6, x[:2]))]
    for model, images, n, options, words in cases:
        with pytest.raises((ValueError, FloatingPointError), match=words):
            fisher(model, images, y, n, generator(), **options)
    with pytest.raises(FloatingPointError, match="does not depend on theta"):
        r.rank1_fisher(small_unet(), x, y, 6, generator(), loss=lambda *batch: 0 * r.per_sample_loss(*batch))


def test_a_fisher_computes_alone_unless_it_is_told_to_share(monkeypatch):
    model, images = small_unet(), small_images(300)
    alone = [fisher(model, *images, 300, generator()) for fisher in FISHERS]
    monkeypatch.setattr(r, "world", lambda: 2)  # as under torchrun
    monkeypatch.setattr(r, "rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda v: pytest.fail("waits for the others"))
    torch.testing.assert_close([fisher(model, *images, 300, generator()) for fisher in FISHERS], alone)
    reduced = []  # what is summed over the processes, here without the other's
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda v: reduced.append(v.clone()))
    for process in (0, 1):
        monkeypatch.setattr(r, "rank", lambda process=process: process)
        r.diagonal_fisher(model, *images, 300, generator(), shared=True)
    torch.testing.assert_close(sum(reduced) / 300, alone[1])
    reduced.clear()
    r.rank1_fisher(model, *images, 300, generator(), shared=True)
    assert [v.shape for v in reduced] == [alone[1].shape, ()]


# ---- Part I: the theory, where it is exact


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
    *_, g = rank1_one_by_one(ScaledIdentity(), *small_images(), 12)
    mu, c_star = r.rank1_fisher(ScaledIdentity(), *small_images(), 12, generator(3))
    directions = g / g.norm(dim=1, keepdim=True)
    assert_close_to_its_largest((directions @ directions.T).abs(), torch.ones(12, 12), 1e-6)
    assert g.norm(dim=1).std() > 0.01 * g.norm(dim=1).mean()  # and differ in length: c(x_t)
    assert_close_to_its_largest(c_star * torch.outer(mu, mu), g.T @ g / 12, 1e-4)


def test_linear_alone_is_not_enough_for_rank_1():
    # With every entry of A free, the gradients (A x_t - eps) x_t^T share no direction.
    batches = r.fisher_batches(*small_images(size=4), 60, generator(3))
    first, second, *_ = geometry.geometry(AnyMatrix(16, 16, bias=False), batches)[0]["eigenvalues"]
    assert second > 0.2 * first


# ---- Part I: penalties, against the paper's formulas with every theta*_k kept


def three_tasks(k=1):
    """(v, c), of k directions, and theta* of each of three tasks; weights on the way through a fourth."""
    rows = torch.randn(3 * k + 4, 50, generator=generator(1))
    v, c, stars = 0.3 * rows[: 3 * k].view(3, k, 50), 1.5 + torch.arange(3.0 * k).view(3, k), rows[-4:-1]
    if k == 1:  # mu, c*
        v, c = v[:, 0], c[:, 0]
    return list(zip(v, c)), stars, stars[-1] + 0.1 * rows[-1]


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


@pytest.mark.parametrize(("kind", "k"), [(r.Rank1Penalty, 1), (beyond.RankKPenalty, 2)])
def test_rank1_and_rank_k_penalty_gradient_and_drift_equal_the_formula_with_stored_weights(kind, k):
    fishers, stars, theta = three_tasks(k)
    v, c = (torch.stack(part).view(3 * k, -1).double() for part in zip(*fishers))
    stars_of_v = stars.repeat_interleave(k, 0).double()  # the direction's own theta*, (3 k, D)

    def formula(theta):
        return 7 / 2 * sum(float(c[j]) * (v[j] @ (theta - stars_of_v[j])) ** 2 for j in range(3 * k))

    penalty = penalty_of(kind, fishers, stars)
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


def both_penalties():
    fishers, stars, theta = three_tasks()
    yield r.Rank1Penalty, fishers, stars, theta
    yield r.DiagonalPenalty, stars**2, stars, theta


def test_a_penalty_is_0_before_its_first_task_and_keeps_one_copy_of_the_weights_for_any_number_of_tasks():
    kept = {r.Rank1Penalty: 3 * (50 + 2) + 50, r.DiagonalPenalty: 2 * 50}
    for kind, fishers, stars, theta in both_penalties():
        assert kind(7.0)(theta).tolist() == 0
        held = vars(penalty_of(kind, fishers, stars)).values()
        assert sum(v.numel() for v in held if torch.is_tensor(v)) == kept[kind]


def test_what_a_penalty_stores_is_its_own_whatever_happens_to_the_arguments():
    for kind, fishers, stars, theta in both_penalties():
        exact = value_and_gradient(penalty_of(kind, fishers, stars), theta)
        penalty = kind(7.0)
        for fisher, theta_star in zip(copy.deepcopy(fishers), stars.clone()):
            weights = theta_star.clone().requires_grad_()  # as flat(model.parameters()) without a detach()
            penalty.add(fisher, weights)
            for v in (*(fisher if isinstance(fisher, tuple) else [fisher]), weights.data):
                v.zero_()
        torch.testing.assert_close(value_and_gradient(penalty, theta), exact)


def test_a_penalty_comes_back_from_its_saved_state_and_not_into_another_kind(tmp_path):
    other = {r.Rank1Penalty: r.DiagonalPenalty, r.DiagonalPenalty: r.Rank1Penalty}
    for kind, fishers, stars, theta in both_penalties():
        penalty = penalty_of(kind, fishers, stars)
        torch.save(penalty.state_dict(), tmp_path / "penalty.pt")
        state, again = torch.load(tmp_path / "penalty.pt", weights_only=True), kind(0.0)
        again.load_state_dict(state)
        state.get("mu", state.get("H")).zero_()
        torch.testing.assert_close(value_and_gradient(again, theta), value_and_gradient(penalty, theta))
        with pytest.raises(ValueError, match=f"not the state of a {other[kind].__name__}"):
            other[kind](0.0).load_state_dict(state)


def test_a_penalty_takes_the_model_or_the_vector_of_its_weights():
    model, moved = Denoiser(), Denoiser()
    mu = torch.randn(len(weights_of(model)), generator=generator())
    with torch.no_grad():
        moved.net.weight.add_(0.1)
    for kind, fisher in ((r.Rank1Penalty, (mu, torch.tensor(2.0))), (r.DiagonalPenalty, mu**2)):
        found = []
        for first in (model, r.flat(model.parameters())):
            for second in (moved, r.flat(moved.parameters())):
                penalty = kind(3.0)
                penalty.add(fisher, first)
                value = penalty(second)
                gradient = torch.autograd.grad(value, moved.net.weight)[0]
                found.append((value, penalty.drift(second), gradient))
        assert found[0][0] > 0
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


def test_weights_that_changed_since_the_last_task_are_refused_by_name():
    model, grown = Denoiser(), Denoiser()
    grown.classes = torch.nn.Embedding(12, 16)
    penalty = r.Rank1Penalty(1.0)
    penalty.add((weights_of(model), 1.0), model)
    for call in (penalty, penalty.drift, lambda weights: penalty.add((weights_of(grown), 1.0), weights)):
        with pytest.raises(ValueError, match=r"classes.weight was \[10, 16\], is \[12, 16\]"):
            call(grown)
    with pytest.raises(ValueError, match="the penalty holds .* weights"):
        penalty(r.flat(grown.parameters()))
    with pytest.raises(ValueError, match="trainable"):
        r.DiagonalPenalty(1.0).add(weights_of(grown), model)


def test_rank1_penalty_is_exact_at_the_papers_size_in_float32():
    D, g = 37_191_681, generator(2)
    mu = 1e-5 * torch.randn(D, generator=g)
    theta_star, theta_start = (0.05 * torch.randn(D, generator=g) for _ in range(2))
    theta = theta_start + 1e-5 * torch.randn(D, generator=g) + 3e-4 * mu
    from_start = mu.double() @ (theta.double() - theta_start.double())
    from_first = mu.double() @ (theta.double() - theta_star.double())
    fishers = 2 * [(mu, torch.tensor(2.5))]
    both = penalty_of(r.Rank1Penalty, fishers, [theta_star, theta_start], lam=15000.0)
    exact = 15000 / 2 * 2.5 * (from_start**2 + from_first**2)
    assert both(theta).item() == pytest.approx(exact.item(), rel=1e-6)
    # With the last task alone the penalty is tiny: mu^T theta - mu^T theta* in float32 would drown it.
    alone = penalty_of(r.Rank1Penalty, fishers, [theta_start], lam=15000.0)
    assert alone(theta).item() == pytest.approx((15000 / 2 * 2.5 * from_start**2).item(), rel=1e-3)


def test_a_penalty_is_the_same_under_autocast():
    for kind, fishers, stars, theta in both_penalties():
        penalty = penalty_of(kind, fishers, stars)
        with torch.autocast("cpu", torch.bfloat16):
            value = penalty(theta)
        assert value.item() == pytest.approx(penalty(theta).item(), rel=1e-6)


# ---- Part I: training


def student_teacher_and_penalty():
    """Networks, and a penalty whose gradient is about as large as the losses'."""
    student, teacher, penalty = small_unet().eval(), small_unet(seed=1).eval(), r.Rank1Penalty(lam=3.0)
    theta = weights_of(student)
    penalty.add((torch.ones_like(theta), torch.tensor(1e-3)), theta - 1e-4)
    return student, teacher, penalty


def test_the_objective_is_the_papers_three_terms():
    student, teacher, penalty = student_teacher_and_penalty()
    batch = small_batch(12)
    exact = *r.losses(student, teacher, *batch), penalty(student)
    torch.testing.assert_close(r.objective(student, teacher, penalty, batch), exact)
    assert min(exact) > 0
    assert r.objective(student, None, None, batch)[1:] == (0, 0)


@pytest.mark.parametrize("accumulate", [0, 1, 3])  # 0: as Part I has it, without a run
def test_a_training_step_is_one_step_of_adam_on_the_sum_of_the_three_terms(accumulate):
    (student, teacher, penalty), batch = student_teacher_and_penalty(), small_batch(12)
    theta, expected = weights_of(student), copy.deepcopy(student)
    exact = torch.stack([*r.losses(expected, teacher, *batch), penalty(expected)])
    exact.sum().backward()
    torch.optim.Adam(expected.parameters(), lr=1e-2, eps=1.0).step()

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, eps=1.0)
    computed = [r.gradient_function(settings(accumulate=accumulate))] if accumulate else []
    terms = r.train_step(student, teacher, penalty, optimizer, batch, *computed)
    torch.testing.assert_close(terms, exact.detach(), rtol=1e-4, atol=1e-6)
    moved, right = (weights_of(model) - theta for model in (student, expected))
    assert (moved - right).norm() < 1e-3 * right.norm()  # eps 1: else the first step is the gradient's sign


def epoch_of(*when, replay=True, size=10):
    x, y = (v[:40] for v in small_images(80))
    old = (small_images(80)[0][40:], torch.arange(40) + 100) if replay else None
    batches = r.epoch_batches(r.Data(x, y, x, y), old, size, *when)
    return [torch.stack(v) for v in zip(*batches)]  # (4, 2 size, ..) each


def test_an_epoch_takes_each_image_once_in_random_order_with_as_many_replayed_ones_each_with_its_own_label():
    x, y = (v[:40] for v in small_images(80))
    old_x = small_images(80)[0][40:]  # no image, and no label, of the new ones
    x0, _, _, labels = epoch_of(0, 1, 0)
    real, replayed = (r.to_uint8(part).flatten(0, 1) for part in (x0[:, :10], x0[:, 10:]))
    which = [int((x == image).flatten(1).all(1).nonzero()) for image in real]
    assert sorted(which) == list(range(40)) != which
    assert labels[:, :10].flatten().equal(y[which])
    which = [int((old_x == image).flatten(1).all(1).nonzero()) for image in replayed]
    assert labels[:, 10:].flatten().equal(100 + torch.tensor(which))
    assert len(set(which)) > 20


def test_every_draw_of_an_epoch_has_a_generator_of_its_own_seeded_by_seed_task_and_epoch():
    x0, t, eps, labels = epoch_of(5, 2, 3)
    order, noise, replay = (r.rng(CPU, 5, purpose, 2, 3) for purpose in ("order", "noise", "replay"))
    assert labels[:, :10].flatten().equal((torch.arange(40) % 10)[torch.randperm(40, generator=order)])
    for i in range(4):
        assert labels[i, 10:].equal(100 + torch.randint(40, (10,), generator=replay))
        drawn_t, drawn_eps = r.draw_noise(x0[i], noise)
        assert t[i].equal(drawn_t) and eps[i].equal(drawn_eps)
    for other in ((6, 2, 3), (5, 3, 3), (5, 2, 4)):
        assert not any(a.equal(b) for a, b in zip(epoch_of(*other), (x0, t, eps, labels)))
    assert epoch_of(5, 2, 3, replay=False)[0].equal(x0[:, :10])


def test_dropout_draws_anew_in_each_epoch_and_the_same_for_the_same():
    drawn = []
    for when in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0)):
        next(r.epoch_batches(r.Data(*small_images(40), *small_images(40)), None, 10, *when))
        drawn.append(torch.rand(5))
    assert drawn[0].equal(drawn[3])
    assert len(torch.stack(drawn).unique(dim=0)) == 3


def digits_state(**changed):
    """Settings, the state before a run on digits, and its tasks."""
    cfg, data = settings(**changed), r.load_data("digits", Path())
    return cfg, r.new_state(cfg, data, CPU), r.split_tasks(data, 5)


def test_with_ema_a_task_ends_with_the_average_of_its_weights(monkeypatch, tmp_path):
    cfg, state, tasks = digits_state(method="finetune", ema=0.9, epochs=2, out=tmp_path)
    path = []
    spy(monkeypatch, r, "train_step", lambda *_: path.append(weights_of(state.model)))
    for task in tasks[:2]:
        r.begin_task(cfg, state)
        average, state.epoch = weights_of(state.model), 0
        path.clear()
        r.train_task(cfg, state, task, None, r.progress())
        assert len(path) == state.step == 6
        for weights in path:
            average = 0.9 * average + 0.1 * weights
        torch.testing.assert_close(weights_of(state.model), average, rtol=1e-4, atol=1e-6)
        state.step = 0


@pytest.mark.parametrize(("decay", "expected"), [("linear", [6, 5, 4, 3, 2, 1]), ("none", [6] * 6)])
def test_the_learning_rate_falls_linearly_to_0_within_a_task_or_stays(monkeypatch, tmp_path, decay, expected):
    cfg, state, tasks = digits_state(method="gd", lr=6e-3, lr_decay=decay, epochs=2, out=tmp_path)
    rates = []
    spy(monkeypatch, r, "train_step", lambda *call: rates.append(call[4].param_groups[0]["lr"]))
    r.begin_task(cfg, state)
    r.train_task(cfg, state, tasks[0], None, r.progress())
    assert rates == pytest.approx([1e-3 * rate for rate in expected])


@pytest.mark.parametrize("penalty", [r.Rank1Penalty, beyond.ProximalPenalty])
def test_training_leaves_the_weights_where_they_lie_in_memory_as_a_recorded_step_reads_them_there(
    penalty, tmp_path
):
    cfg, state, tasks = digits_state(method="rank1", ema=0.9, epochs=2, out=tmp_path)
    state.penalty, theta = penalty(10.0), weights_of(state.model)
    state.penalty.add((torch.ones_like(theta), torch.tensor(2.0)), theta)
    r.begin_task(cfg, state)
    places = [p.data_ptr() for p in state.model.parameters()]
    r.train_task(cfg, state, tasks[1], (tasks[1].x, tasks[1].y), r.progress())
    assert [p.data_ptr() for p in state.model.parameters()] == places
    assert not weights_of(state.model).equal(theta)


def test_afid_and_forgetting_equal_a_matrix_worked_by_hand():
    afid, forgetting = r.afid_and_forgetting([[4.0, None, None], [6.0, 10.0, None], [9.0, 12.0, 3.0]])
    assert afid == [4, 8, 8]
    assert forgetting == pytest.approx((5 + 2 + 0) / 3)
    assert r.afid_and_forgetting([[4.0, 5.0, 9.0]]) == ([6], None)  # joint training


# ---- Part I: the loop over the tasks, on six images a class


TINY = ["--channels=8", "--epochs=1", "--batch-size=4", "--sample-steps=1", "--replay-per-class=2"]
TINY += ["--fisher-samples=10"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """tiny(flag, ..) runs five tasks of two grey classes, and returns the result and what the run called."""
    y = torch.arange(10).repeat_interleave(6)
    noise = torch.randint(20, (60, 1, 8, 8), generator=generator())
    x = (24 * y[:, None, None, None] + noise).to(torch.uint8)
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: r.Data(x, y, x.flip(2), y), ""))
    features = lambda images: images.flatten(1)[:, :4].double().numpy()
    monkeypatch.setattr(r, "classifier_features", lambda *_: features)
    calls = {
        name: [] for name in ("replay_pool", "train_task", "sample_images", "fisher", "losses", "train_step")
    }
    for name in ("replay_pool", "train_task", "sample_images", "losses", "train_step"):
        spy(monkeypatch, r, name, lambda out, *args, name=name: calls[name].append((out, *args)))

    def run(*argv, out="run", method="rank1"):
        row = r.METHODS[method]
        if row.fisher:

            def fisher(model, *args, **options):
                calls["fisher"].append((weights_of(model), args, options))
                return row.fisher(model, *args, **options)

            monkeypatch.setitem(r.METHODS, method, row._replace(fisher=fisher))
        result = r.main([*TINY, "--out", str(tmp_path / out), "--method", method, *argv])
        monkeypatch.setitem(r.METHODS, method, row)
        return result, calls

    return run


@pytest.mark.parametrize("method", r.METHODS)
def test_each_methods_row_does_what_its_name_says(tiny, tmp_path, method):
    joint, replays = method == "joint", method not in ("joint", "finetune", "diag-only", "rank1-only")
    distills, penalizes = replays and method != "replay", method.startswith(("diag", "rank"))
    result, calls = tiny(method=method)
    learned = [task.y.unique().tolist() for _, _, _, task, _, _ in calls["train_task"]]
    replayed = [replay and replay[1].unique().tolist() for *_, replay, _ in calls["train_task"]]
    assert learned == ([list(range(10))] if joint else [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])
    assert replayed == [list(range(2 * k)) if replays and k > 0 else None for k in range(len(learned))]
    log = read_log(tmp_path / "run")
    assert [line["distill"] > 0 for line in log] == [k > 0 and distills for k in range(len(log))]
    assert [line["ewc"] > 0 for line in log] == [k > 0 and penalizes for k in range(len(log))]
    assert len(result["fisher"]) == len(result["drift"]) == 4 * penalizes
    assert (result["lam"] > 0) == penalizes
    assert [row.count(None) for row in result["fid"]] == ([0] if joint else [4, 3, 2, 1, 0])
    assert joint == (result["forgetting"] is None) == (result["fid_pooled"] is not None)
    assert (result["afid"], result["forgetting"]) == r.afid_and_forgetting(result["fid"])


def test_the_teacher_is_the_model_as_the_last_task_left_it_and_it_does_not_learn(tiny, monkeypatch):
    ends = []
    spy(monkeypatch, r, "train_task", lambda _, cfg, state, *rest: ends.append(weights_of(state.model)))
    _, calls = tiny("--method=gd", method="gd")
    teachers = [r.flat(teacher.parameters()) for _, _, teacher, *_ in calls["replay_pool"]]
    assert all(teacher.equal(end) for teacher, end in zip(teachers, ends, strict=False))
    assert len(teachers) == 4
    assert not any(teacher.requires_grad for teacher in teachers)
    assert {teacher is None for _, _, teacher, *_ in calls["losses"]} == {True, False}


def test_a_fisher_is_taken_of_the_finished_model_on_the_tasks_images_after_each_task_but_the_last(
    tiny, monkeypatch
):
    ends = []
    spy(monkeypatch, r, "train_task", lambda _, cfg, state, *rest: ends.append(weights_of(state.model)))
    result, calls = tiny()
    assert len(calls["fisher"]) == len(result["fisher"]) == 4
    for k, (weights, (x, y, n, draws), options) in enumerate(calls["fisher"]):
        assert weights.equal(ends[k])
        assert (y.unique().tolist(), len(x), n) == ([2 * k, 2 * k + 1], 12, 10)
        assert options == {"shared": True}
        assert draws.initial_seed() == r.rng(CPU, 0, "fisher", k).initial_seed()
    assert [len(row) for row in result["drift"]] == [1, 2, 3, 4]  # of every old task, after tasks 2 to 5


def test_a_tasks_fid_is_of_its_test_images_and_of_samples_with_the_same_labels_from_the_same_noise(tiny):
    result, calls = tiny(method="finetune")
    samples = [
        (images, noise, y) for images, _, _, noise, y, name, *_ in calls["sample_images"] if "task" in name
    ]
    assert len(samples) == 15
    tasks = [k for j in range(5) for k in range(j + 1)]
    first = {}
    test_y = torch.arange(10).repeat_interleave(6)
    x = next(iter(r.LOADERS["digits"][0](None)[2:3]))
    for (images, noise, y), k, fid in zip(
        samples, tasks, [v for row in result["fid"] for v in row if v is not None]
    ):
        assert y.equal(test_y[12 * k : 12 * k + 12])
        assert noise.equal(first.setdefault(k, noise))
        pictures = [v.flatten(1)[:, :4].double().numpy() for v in (x[12 * k : 12 * k + 12], images)]
        assert fid == pytest.approx(r.frechet_distance(*pictures))
    assert not first[0].equal(first[1])


def test_the_pooled_fid_of_joint_training_is_of_all_classes_together(tiny):
    result, calls = tiny(method="joint")
    images = [images for images, *_, name in calls["sample_images"] if str(name).startswith("samples")]
    x = r.LOADERS["digits"][0](None).test_x
    pictures = [v.flatten(1)[:, :4].double().numpy() for v in (x, torch.cat(images))]
    assert result["fid_pooled"] == pytest.approx(r.frechet_distance(*pictures))


def test_rank1_without_a_penalty_is_gd_to_the_last_digit(tiny):
    # lambda 0 is the baseline, and the Fisher's random draws change nobody else's.
    assert tiny("--lam=0", out="a")[0]["fid"] == tiny(out="b", method="gd")[0]["fid"]


def test_a_model_that_does_not_move_has_the_same_fid_after_every_task(tiny, monkeypatch):
    monkeypatch.setattr(r, "train_task", lambda *_: None)
    fid = tiny("--dropout=0.5", method="finetune")[0]["fid"]
    assert all(fid[j][k] == fid[k][k] for j in range(5) for k in range(j))


def test_the_progress_bar_counts_the_steps_of_the_whole_run(tiny, monkeypatch):
    bars = []
    monkeypatch.setattr(r, "QUIET", False)
    spy(monkeypatch, r, "progress", lambda bar, *_: bars.append(bar))
    _, calls = tiny(method="gd")
    (bar,) = [bar for bar in bars if bar.unit == "step"]
    assert bar.n == bar.total == len(calls["train_step"]) == 5 * 3


# ---- Part II: the network

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


# ---- Part II: the data


def test_uint8_images_survive_the_way_to_float_and_back_and_floats_in_range_stay():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(r.to_uint8(r.to_float(every)), every)
    assert (r.to_float(every).min(), r.to_float(every).max()) == (-1, 1)
    assert r.to_float(r.to_float(every)).equal(r.to_float(every))


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
    images = torch.stack([y // 256, y % 256], 1).to(torch.uint8).view(-1, 1, 1, 2)  # an image shows its label
    monkeypatch.setitem(r.LOADERS, "any", (lambda _: r.Data(images, y, images[:20000], y[:20000]), ""))
    parts = r.split_tasks(r.load_data("any", Path()), 20)
    for k, part in enumerate(parts):
        for x, labels in ((part.x, part.y), (part.test_x, part.test_y)):
            assert sorted(set(labels.tolist())) == list(range(k * 50, (k + 1) * 50))
            assert (256 * x[:, 0, 0, 0].long() + x[:, 0, 0, 1]).equal(labels)
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


def test_a_loader_whose_images_are_not_uint8_is_refused(capsys, monkeypatch, tmp_path):
    images, y = small_images(40)
    for wrong in (images.float() / 255, images.long(), images[:, 0]):
        monkeypatch.setitem(r.LOADERS, "digits", (lambda _, wrong=wrong: r.Data(wrong, y, wrong, y), ""))
        error = refusal(capsys, *QUICK, "--out", tmp_path)
        assert all(word in error for word in ("uint8 in 0..255", "(N, C, H, W)", str(wrong.dtype)))


# ---- Part II: the metric


def test_frechet_distance_equals_clean_fids_and_a_case_solved_by_hand():
    a, b = (torch.randn(200, 8, generator=generator(s)).numpy() * (1 + s) + s for s in range(2))
    exact = cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert r.frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)
    # Uncorrelated axes: each adds (difference of means)^2 + (difference of standard deviations)^2.
    a = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # variance 4/3 on both axes
    by_hand = 2 * 5**2 + 2 * (3 * math.sqrt(4 / 3) - math.sqrt(4 / 3)) ** 2
    assert r.frechet_distance(a, 3 * a + 5) == pytest.approx(by_hand)
    assert r.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_inception_gets_rgb_in_0_to_255_and_resizes_itself(monkeypatch):
    asked, shapes = [], set()

    def build(mode, device, use_dataparallel):
        asked.append(mode)
        return lambda batch: shapes.add((*batch.shape[1:],)) or batch.mean((2, 3))  # the mean colour

    monkeypatch.setattr(cleanfid.features, "build_feature_extractor", build)
    images = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    colours = np.arange(250)[:, None].repeat(3, 1)
    np.testing.assert_allclose(r.inception_features(CPU)(images), colours, atol=1e-3)
    assert (asked, shapes) == (["legacy_tensorflow"], {(3, 8, 8)})


def test_classifier_is_good_trained_once_and_a_damaged_file_of_it_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = r.load_data("digits", tmp_path)
    features = r.classifier_features("digits", data, CPU)(data.test_x[:20])
    assert features.shape == (20, 64)
    assert float(capsys.readouterr().out.split(", ")[1].split("%")[0]) > 95  # of the test images, right
    (file,) = (tmp_path / "cache/rank1_ewc").iterdir()
    written = file.stat().st_mtime_ns
    assert np.array_equal(features, r.classifier_features("digits", data, CPU)(data.test_x[:20]))
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:100])
    assert str(file) in refusal(capsys, *QUICK, "--out", tmp_path / "out")


# ---- Part III: importing, settings, files


def test_importing_changes_nothing_loads_nothing_heavy_and_needs_no_home_folder():
    program = """
import os, pathlib, signal, sys, torch
def nowhere(*_): raise RuntimeError("no home folder")
pathlib.Path.home = nowhere
def state():
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32, torch.initial_seed()
    handler = signal.getsignal(signal.SIGTERM)
    return dict(os.environ), sys.stdout, sys.stderr, torch.get_num_threads(), handler, flags
before = state()
from rank1_ewc import rank1_fisher
assert state() == before
print({"cleanfid", "filelock", "sklearn", "matplotlib", "pandas"} & {*sys.modules})
"""
    command = [sys.executable, "-c", program]
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "x", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "left over"}
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "set()\n"


def test_world_size_without_torchrun_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left over")
    assert r.set_up(settings(device="auto")).type in ("cpu", "cuda", "mps")
    assert (r.world(), r.rank()) == (1, 0)


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


# ---- Part III: runs that survive


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
    """finished(flag, ..) is the folder of a whole run on digits with these flags, made once for all tests."""

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
    assert (result["dataset"], result["method"], result["seed"]) == ("digits", "rank1", 0)
    assert set(result["seconds"]) == {"replay", "train", "fisher", "fid"}
    assert result["script"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    assert min(result["fid_real"]) > 1  # of training images: of the test images themselves it would be 0
    assert [line["task"] for line in log] == [1, 2, 3, 4, 5]
    r.UNet(1, 10, (8,), 1).load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    pictures = [f"samples-task{k}.png" for k in range(1, 6)]
    for k, name in enumerate(pictures, 1):
        picture = torchvision.io.decode_image(str(tmp_path / name)).float()
        assert picture.shape[1:] == (2 * k * 34 + 2, 10 * 34 + 2)
        assert picture.std() > 1
    files = {*pictures, "checkpoint.pt", "log.jsonl", "model.pt", "result.json", ".lock"}  # no partial.json
    assert set(contents(tmp_path)) == files


def interrupted(tiny, what, nth, *argv, **options):
    """A run with a checkpoint after every epoch, and Ctrl-C in the place of r.`what`'s nth call."""
    function, turns = getattr(r, what), itertools.count(1)

    def stops(*args, **options):
        if next(turns) == nth:
            raise KeyboardInterrupt
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(r, "CHECKPOINT_SECONDS", -1)
        patch.setattr(r, what, stops)
        tiny(*argv, **options)
    assert stopped.value.code == 130


STOPS = [
    ("train_step", 7, "--dropout=0.1", "1 of 5 tasks and 0 epochs"),
    ("train_step", 11, "--dropout=0.1", "1 of 5 tasks and 1 epochs"),
    ("frechet_distance", 7, "--dropout=0.1", "1 of 5 tasks and 2 epochs"),
    ("write_json", 6, "--dropout=0.1", "5 of 5 tasks and 0 epochs"),  # all is done but the result
    ("train_step", 16, "--method=joint", "0 of 5 tasks and 1 epochs"),
    ("train_step", 11, "--method=diag-only", "1 of 5 tasks and 1 epochs"),
    ("train_step", 11, "--method=rank1-proximal --ema=0.9", "1 of 5 tasks and 1 epochs"),
]


def with_rows_of_beyond(monkeypatch):
    for name, row in beyond.METHODS.items():
        monkeypatch.setitem(r.METHODS, name, row)


@pytest.mark.parametrize(("what", "nth", "argv", "at"), STOPS)
def test_ctrl_c_prints_a_command_that_ends_the_run_the_same(
    tiny, tmp_path, capsys, monkeypatch, what, nth, argv, at
):
    with_rows_of_beyond(monkeypatch)
    argv, stopped, whole = ["--epochs=2", *argv.split()], tmp_path / "stopped", tmp_path / "whole"
    interrupted(tiny, what, nth, *argv, "--fresh", out="stopped")
    assert not (stopped / "result.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rank1_ewc: interrupted")
    r.main(shlex.split(last.split(": ")[-1])[2:])  # without --fresh, which would begin again
    assert f"{stopped / 'checkpoint.pt'}: {at}" in capsys.readouterr().out
    tiny(*argv, out="whole")
    assert read_result(stopped) | {"seconds": None} == read_result(whole) | {"seconds": None}
    assert read_log(stopped) == read_log(whole)
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (stopped, whole)]
    torch.testing.assert_close(*models, rtol=0, atol=0)


def test_a_checkpoint_holds_the_teacher_the_optimizer_and_the_penalty(tmp_path):
    cfg, state, tasks = digits_state(method="rank1", out=tmp_path)
    state.task = 1
    r.begin_task(cfg, state)
    state.penalty.add((weights_of(state.model), 2.0), state.model)
    with torch.no_grad():
        for p in state.teacher.parameters():
            p.add_(1)  # not what the model is
    r.train_task(cfg, state, tasks[1], (tasks[0].x, tasks[0].y), r.progress())
    r.save_checkpoint(cfg, state)
    again = r.new_state(cfg, r.load_data("digits", Path()), CPU)
    r.load_checkpoint(cfg, again)
    for name in ("model", "teacher", "optimizer", "penalty"):
        saved, loaded = (getattr(s, name).state_dict() for s in (state, again))
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    assert not any(p.requires_grad for p in again.teacher.parameters())
    assert (again.task, again.epoch, again.step, again.log) == (1, 1, 3, state.log)


def test_a_run_that_is_not_finished_shows_what_it_has(tiny, tmp_path):
    interrupted(tiny, "train_step", 9)  # in the third task
    result = json.loads((tmp_path / "run/partial.json").read_text())
    assert len(result["fid"]) == len(result["afid"]) == 2
    assert result["forgetting"] is None
    assert (tmp_path / "run/samples-task2.png").exists()


def test_a_finished_run_given_again_prints_its_result_and_does_nothing(tiny, tmp_path, monkeypatch, capsys):
    tiny()
    before = contents(tmp_path / "run")
    monkeypatch.setitem(r.LOADERS, "digits", None)  # not even the data is read
    result, _ = tiny()
    assert f"AFID {result['afid'][-1]:.2f}" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_fresh_starts_over_another_seed_gives_another_result_and_the_old_one_does_not_outlive_it(tiny):
    first, _ = tiny("--seed=1")
    interrupted(tiny, "train_step", 2, "--seed=2", "--fresh")
    second, _ = tiny("--seed=2")
    assert (first["seed"], second["seed"]) == (1, 2)
    assert first["fid"] != second["fid"]


@pytest.mark.parametrize("file", ["checkpoint.pt", "result.json"])
def test_a_file_of_other_settings_or_a_damaged_one_is_refused_and_kept(tiny, tmp_path, capsys, file):
    tiny(out="whole")
    whole, folder = (tmp_path / "whole" / file).read_bytes(), tmp_path / "run"
    folder.mkdir()
    cases = [(whole, "--lam=11", "--lam 10.0 11.0"), (whole, "--tasks=2", "--tasks 5 2")]
    cases += [(broken, "--lam=10", "damaged") for broken in (b"", b"{}", whole[: len(whole) // 2])]
    if file == "result.json":  # of a setting that there was once, at another value than what is done now
        retired = whole.replace(
            b'"lam": 10.0, "fisher_samples"', b'"form": "%s", "lam": 10.0, "fisher_samples"'
        )
        assert b"form" in retired
        cases += [(retired % b"proximal", "--lam=10", "--form proximal not know")]
    for written, flag, words in cases:
        (folder / file).write_bytes(written)
        error = refusal(capsys, *TINY, flag, "--out", folder)
        assert all(word in error for word in [*words.split(), str(folder / file), "--fresh"])
        assert contents(folder)[file] == written
    if file == "result.json":
        (folder / file).write_bytes(retired % b"loss")  # as it is done still
        assert r.main([*TINY, "--out", str(folder)])["method"] == "rank1"


def test_a_folder_that_another_run_writes_into_is_refused_and_left_alone(tiny, tmp_path, capsys):
    tiny()
    before = contents(tmp_path / "run")
    with filelock.FileLock(tmp_path / "run/.lock"):
        assert f"{tmp_path}/run" in refusal(capsys, *TINY, "--fresh", "--out", tmp_path / "run")
    assert contents(tmp_path / "run") == before


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


@pytest.mark.slow
def test_a_closed_stderr_and_a_stdout_that_takes_ascii_alone_end_no_run(tiny, tmp_path):
    tiny()
    show = "import rank1_ewc as r; r.table = lambda _: '\xb1'; r.program()"
    command = f"PYTHONIOENCODING=ascii {shlex.quote(sys.executable)} -c {shlex.quote(show)}"
    command += f" {shlex.join([*TINY, '--method=rank1', '--out', str(tmp_path / 'run')])} 2>&-"
    done = subprocess.run(command, shell=True, cwd=SCRIPT.parent, check=True, capture_output=True)
    assert done.stdout.startswith(b"?\n")


@needs_cuda
def test_a_run_on_cuda_goes_on_after_an_interrupt(tiny):
    interrupted(tiny, "train_step", 11, "--epochs=2", "--device=cuda")
    assert len(tiny("--epochs=2", "--device=cuda")[0]["fid"]) == 5


@needs_cuda
@pytest.mark.parametrize(
    ("penalty", "accumulate"), [(r.Rank1Penalty, 1), (r.Rank1Penalty, 2), (beyond.ProximalPenalty, 1)]
)
def test_recorded_steps_are_the_same_as_others(penalty, accumulate):
    x, y = (v.cuda() for v in small_images(40))
    task, losses, weights = r.Data(x, y, x, y), [], []
    for recorded in (False, True):
        gradient_of = r.gradient_function(settings(device="cuda", accumulate=accumulate, cuda_graph=recorded))
        student, teacher = small_unet(dropout=0.1).cuda(), small_unet(seed=1).cuda().eval()
        theta, held = weights_of(student), penalty(lam=3.0)
        held.add((torch.ones_like(theta), theta.new_tensor(2.0)), theta - 1e-4)
        networks = student, teacher, held, torch.optim.Adam(student.parameters(), lr=1e-3)
        batches = r.epoch_batches(task, (x, y), 8, 0, 1, 0)
        losses.append(torch.stack([r.train_step(*networks, batch, gradient_of) for batch in batches]))
        weights.append(weights_of(student))
    assert len(losses[0]) == 5
    assert torch.equal(*losses) and torch.equal(*weights)


@needs_cuda
def test_cuda_and_the_cpu_find_the_same_mean_gradient():
    model, batch = small_unet(channels=(16, 32, 32)).eval(), small_batch(20)
    mu = gradients_one_by_one(model, [batch]).mean(0)
    loss = r.per_sample_loss(model.cuda(), *(v.cuda() for v in batch)).mean()
    assert_close_to_its_largest(r.flat(torch.autograd.grad(loss, model.parameters())).cpu(), mu, 1e-3)


def test_bf16_trains_and_samples_in_bfloat16_and_keeps_weights_and_fisher_in_float32(
    tiny, tmp_path, monkeypatch
):
    seen = {"train_step": set(), "sample_images": set(), "diagonal_fisher": set()}
    doing = ["nothing"]
    spy(monkeypatch, r.UNet, "forward", lambda eps, *_: seen.setdefault(doing[0], set()).add(eps.dtype))
    for name in ("train_step", "sample_images"):
        function = getattr(r, name)

        def does(*args, name=name, function=function):
            doing[0] = name
            out = function(*args)
            doing[0] = "fisher"
            return out

        monkeypatch.setattr(r, name, does)
    for method in ("rank1", "diag"):
        result, _ = tiny("--bf16", method=method, out=method)
        assert all(math.isfinite(v) for v in result["afid"])
    assert (seen["train_step"], seen["sample_images"]) == ({torch.bfloat16}, {torch.bfloat16})
    assert seen["fisher"] == {torch.float32}
    saved = torch.load(tmp_path / "diag/model.pt", weights_only=True)
    assert {v.dtype for v in saved.values()} == {torch.float32}


# ---- Part III: more than one process

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
    cfg, state, _ = digits_state(out=tmp_path)
    monkeypatch.setattr(r, "world", lambda: 2)
    monkeypatch.setattr(r, "all_sum", lambda v: v + 1)  # the other process stands one task further
    with pytest.raises(SystemExit):
        r.load_checkpoint(cfg, state)
    assert "same files" in capsys.readouterr().err


ONE_OF_TWO = """
import torch, rank1_ewc as r, torch.distributed as dist
dist.init_process_group()
model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 1, 1))
model, images = torch.nn.parallel.DistributedDataParallel(model), torch.arange(6400).view(100, 1, 8, 8).byte()
def fisher(network, n=100):
    loss = lambda model, x0, t, eps, y: (model(r.add_noise(x0, t, eps)) - eps).square().flatten(1).mean(1)
    return r.rank1_fisher(network, images[:n], torch.zeros(n), n, torch.Generator().manual_seed(0), loss=loss)
if dist.get_rank() == 0:
    torch.testing.assert_close(fisher(model), fisher(model.module))
    penalty = r.Rank1Penalty(1.0)
    penalty.add(fisher(model), model)
    assert penalty(model.module) == 0
dist.barrier()
torch.testing.assert_close(fisher(model, 40 + dist.get_rank()), fisher(model.module, 40 + dist.get_rank()))
"""


@pytest.mark.slow
def test_under_torchrun_one_process_alone_can_take_a_fisher_of_a_model_in_ddp():
    subprocess.run([*TWO, sys.executable, "-c", ONE_OF_TWO], cwd=SCRIPT.parent, check=True, timeout=120)


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


# ---- results/beyond.py: F's top eigenvectors, a part of the timesteps, the proximal step


@pytest.mark.parametrize("k", [1, 4])
def test_rank_k_fisher_is_the_best_of_rank_k_for_the_per_sample_gradients(k):
    model = small_unet()
    *_, g, _ = rank1_one_by_one(model, *small_images(), 12)  # F = g^T g / 12
    v, values = beyond.rank_k_fisher(model, *small_images(), 12, generator(3), k=k)
    _, singular, directions = torch.linalg.svd(g / math.sqrt(12), full_matrices=False)
    torch.testing.assert_close(values.double(), singular[:k] ** 2, rtol=1e-3, atol=0)
    cosines = (v.double() @ directions[:k].T).abs()
    torch.testing.assert_close(cosines, torch.eye(k).double(), atol=1e-2, rtol=0)


def test_rank_k_fisher_keeps_no_more_gradients_than_fit_and_refuses_fewer_than_directions(monkeypatch):
    model, shapes = small_unet(), []
    weights = len(weights_of(model))
    spy(monkeypatch, beyond, "eigenpairs", lambda out, G, k: shapes.append(G.shape))
    for fit, most in ((5, 1024), (100, 7)):
        monkeypatch.setattr(beyond, "GRADIENT_FLOATS", fit * weights)
        monkeypatch.setattr(beyond, "GRADIENTS", most)
        beyond.rank_k_fisher(model, *small_images(), 12, generator(), k=2)
    assert shapes == [(5, weights), (7, weights)]
    with pytest.raises(ValueError, match="rank 2 needs at least 2 gradients, not 1"):
        beyond.rank_k_fisher(model, *small_images(), 1, generator(), k=2)


@pytest.mark.parametrize(("first", "end"), [(0, 333), (333, 667), (667, 1000), (700, 701)])
def test_a_part_of_the_timesteps_is_taken_evenly_and_with_the_same_images_and_noise(first, end):
    x0, t, eps, y = next(r.fisher_batches(*small_images(128), 128, generator()))
    part = beyond.squeezed(torch.arange(1000), first, end)
    assert (part.min(), part.max(), len(part.unique())) == (first, end - 1, end - first)
    assert part.bincount()[first:].max() - part.bincount()[first:].min() <= 1
    model, loss = small_unet().eval(), beyond.loss_in(first, end)
    exact = r.per_sample_loss(model, x0, beyond.squeezed(t, first, end), eps, y)
    torch.testing.assert_close(loss(model, x0, t, eps, y), exact)


@pytest.mark.parametrize("eta", [1e-3, 10.0])
def test_the_proximal_step_minimizes_penalty_plus_distance(eta):
    fishers, stars, theta = three_tasks()
    penalty = penalty_of(beyond.ProximalPenalty, fishers, stars)
    z = torch.nn.Linear(50, 1, bias=False)
    with torch.no_grad():
        z.weight.copy_(theta)
    penalty.after_step(z, eta)
    formula = penalty_of(r.Rank1Penalty, fishers, stars)
    gradient = value_and_gradient(
        lambda z: formula(z) + (z - theta).square().sum() / (2 * eta), weights_of(z)
    )[1]
    assert gradient.norm() < 1e-3 * value_and_gradient(formula, theta)[1].norm()


def test_a_stiff_proximal_step_keeps_the_weights_where_the_old_tasks_want_them(tiny, monkeypatch):
    with_rows_of_beyond(monkeypatch)
    drift, free = (tiny(f"--lam={lam}", method="rank1-proximal", out=lam)[0]["drift"] for lam in ("1e9", "0"))
    for held, moved in zip(drift, free):
        assert max(map(abs, held)) < 0.01 * max(map(abs, moved))


@pytest.mark.parametrize("method", beyond.METHODS)
def test_the_rows_that_beyond_adds_run(tiny, monkeypatch, method):
    with_rows_of_beyond(monkeypatch)
    result, calls = tiny(method=method)
    directions = {"rank2": 2, "rank4": 4}.get(method, 1)
    assert [len(row) for row in result["drift"]] == [directions * k for k in (1, 2, 3, 4)]
    assert all(term > 0 for term in calls["train_step"][-1][0])


@pytest.mark.slow
def test_beyond_takes_the_scripts_flags_and_refuses_fewer_samples_than_directions(tmp_path):
    for flags, status, words in (
        ([], 0, "digits, rank4: FID"),
        (["--fisher-samples=3"], 2, "--fisher-samples --method rank4"),
    ):
        command = [
            sys.executable,
            "-m",
            "results.beyond",
            "--method=rank4",
            *QUICK,
            "--out",
            str(tmp_path),
            *flags,
        ]
        done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert all(word in done.stdout + done.stderr for word in words.split())


# ---- results/geometry.py: what a trained model says


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
    monkeypatch.setattr(beyond, "GRADIENTS", 20)
    monkeypatch.setattr(geometry, "TIMES", [100, 700])
    monkeypatch.setattr(geometry, "VAE_STEPS", [0, 5])
    run, to = finished(), tmp_path / "new/figure"
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
        ("--batch-size 10 --accumulate 3", "--batch-size 10 3"),
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
    monkeypatch.setattr(cleanfid.features.InceptionV3W, "__init__", urllib.request.urlopen)
    assert "--fid classifier" in refusal(capsys, "--fid", "inception", "--out", tmp_path)
