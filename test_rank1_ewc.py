"""A test for each claim of rank1_ewc.py and results/, against the slow, obvious computation.

They follow the three parts of the script, then results/ and the texts. Tests marked `slow` start
processes or train whole runs on the digits: `pytest -m "not slow"` runs all others.
"""

import copy
import functools
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cleanfid.features
import filelock
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torchvision
from PIL import Image
from torch.nn import functional
from torch.testing import assert_close

import rank1_ewc as r
from results import bench, beyond, geometry, report

SCRIPT = Path(r.__file__)
CPU = torch.device("cpu")
FISHERS = [r.rank1_fisher, r.diagonal_fisher]
QUICK = ["--channels=16", "--epochs=1", "--sample-steps=2", "--replay-per-class=3"]
QUICK += ["--fisher-samples=200"]
TINY = ["--channels=16", "--epochs=1", "--sample-steps=1", "--replay-per-class=2"]
TINY += ["--fisher-samples=10", "--batch-size=4"]
RUN = Path("run")  # where most runs go: each test has a folder of its own
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
torch.set_num_threads(1)  # these networks are too small to gain from more


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path_factory, tmp_path):
    """Keep tests away from the network and the user's files, and stop a test that hangs."""
    torch.manual_seed(0)
    no_network = Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))  # for the processes that tests start
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    signal.signal(signal.SIGALRM, Mock(side_effect=TimeoutError("the test hangs")))
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name, see) -> a list: each call of owner.name adds see(result, *arguments)."""

    def watch(owner, name, see):
        function = getattr(owner, name)
        seen = []

        def seeing(*args, **options):
            result = function(*args, **options)
            seen.append(see(result, *args))
            return result

        monkeypatch.setattr(owner, name, seeing)
        return seen

    return watch


@pytest.fixture
def assert_refused(capsys):
    """assert_refused(words, main, *given): it exits with 2, and stderr ends with these words."""

    def check(words, main, *given):
        with pytest.raises(SystemExit) as stopped:
            main(*given)
        assert stopped.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        for word in ["rank1_ewc:", *words.split()]:
            assert word in error

    return check


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_unet(seed=0, channels=(16, 16, 16), dropout=0.0):
    torch.manual_seed(seed)
    return r.UNet(1, 10, channels, layers_per_block=1, dropout=dropout).eval()


def per_image(v):
    """(B,) -> (B, 1, 1, 1), a number for all pixels of an image."""
    return v[:, None, None, None]


def small_images(n=6):
    images = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator())
    return images, torch.arange(n) % 10


def small_batch(n=6):
    return next(r.fisher_batches(*small_images(n), n, generator()))


def taken(fisher, model, n=12, images=None, **loss):
    """The Fisher of a few images, with the same draws each time."""
    return fisher(model, *(images or small_images(n)), n, generator(3), **loss)


def weights_of(model):
    return r.flat(r.trainable(model)).detach().clone()


def settings(**changed):
    """Settings as parse_args and set_up make them, on the CPU."""
    cfg = r.parse_args(QUICK)
    vars(cfg).update({"device": "cpu", "bf16": False}, **changed)
    return cfg


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def text_of(path):
    return Path(path).read_text(encoding="utf-8")


def assert_close_to_its_largest(found, exact, error):
    """No entry is off by more than this share of the largest."""
    largest = float(exact.abs().max())
    assert_close(found.double(), exact.double(), atol=error * largest, rtol=0)


# ---- Part I: diffusion
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 2), (3, 1, 8, 8), (3, 1, 4, 4, 4)])
def test_add_noise_is_the_papers_formula_for_points_sequences_images_and_volumes(shape):
    x0 = torch.randn(shape)
    eps = torch.randn(shape)
    times = [0, 300, 999]
    noisy = r.add_noise(x0, torch.tensor(times), eps)
    for i, t in enumerate(times):
        exact = math.sqrt(ABAR[t]) * x0[i] + math.sqrt(1 - ABAR[t]) * eps[i]
        assert_close(noisy[i], exact, atol=1e-4, rtol=0)


def test_the_schedule_is_float32_whatever_the_default_is_when_it_is_first_asked_for():
    r.alphas_cumprod.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert r.alphas_cumprod(CPU).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("steps", [50, 7])
def test_ddim_is_its_formula_with_leading_timesteps_and_a_clipped_image(steps):
    def model(x, t, y):
        return x.mul_(3) - 0.1  # so large that x0_hat leaves [-1, 1]; it works in place

    noise = torch.randn(2, 1, 2, 2)
    x = noise.double()
    for k in reversed(range(steps)):
        abar = ABAR[k * (1000 // steps)]
        abar_next = ABAR[(k - 1) * (1000 // steps)] if k > 0 else 1.0
        eps = 3 * x - 0.1
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        x = math.sqrt(abar_next) * x0.clamp(-1, 1) + math.sqrt(1 - abar_next) * eps
    found = r.ddim_sample(model, noise, torch.zeros(2), steps)
    assert_close(found, x.float(), atol=1e-3, rtol=1e-3)


def test_images_have_one_conversion_and_what_it_does_not_take_is_refused():
    images, y = small_images()
    floats = r.to_float(images)
    assert_close(floats, (images.double() / 127.5 - 1).float())
    assert r.to_float(floats) is floats
    assert r.to_uint8(floats).equal(images)
    with pytest.raises(ValueError, match="x0 must be floats"):
        r.add_noise(images, torch.zeros(6).long(), images)
    for wrong in (images.long(), images.float(), images / 255, floats * math.nan):
        with pytest.raises(ValueError, match="images must be uint8, or floats in -1..1"):
            r.to_float(wrong)
        with pytest.raises(ValueError, match="images must be uint8"):
            next(r.fisher_batches(wrong, y, 6, generator()))


def test_odd_batches_and_predictions_that_would_broadcast_are_refused():
    def wide(x, t, y):
        return x.expand(-1, 2, -1, -1)

    batch = small_batch()
    calls = [
        (r.losses, Denoiser(), Denoiser(), *small_batch(5)),
        (r.losses, Denoiser(), wide, *batch),
        (r.losses, wide, None, *batch),
        (r.per_sample_loss, wide, *batch),
        (r.ddim_sample, wide, batch[2], batch[3], 2),
    ]
    for function, *given in calls:
        with pytest.raises(ValueError, match="half of the rows must be real|in the shape of x_t"):
            function(*given)


# ---- Part I: generative distillation
def test_replay_pool_holds_equally_many_of_every_old_class_always_from_the_same_noise(monkeypatch):
    def sampler(model, noise, y, steps):  # an image is as grey as its class says
        noises.extend(noise)
        assert steps == 3
        return per_image(y) / 5 - 1 + 0 * noise

    monkeypatch.setattr(r, "ddim_sample", sampler)
    noises = []
    for num_old in (2, 4):
        cfg = settings(replay_per_class=70, replay_steps=3)
        x, y = r.replay_pool(cfg, Denoiser(), (1, 8, 8), num_old)
        assert x.dtype == torch.uint8
        assert y.equal(torch.arange(num_old).repeat_interleave(70))  # class after class
        assert (x[:, 0, 0, 0] // 25).equal(y)
    for i, noise in enumerate(noises):
        assert noise.equal(noises[i % 70])
    assert not noises[0].equal(noises[1])


def test_one_student_pass_denoises_real_rows_and_imitates_a_teacher_on_replayed_ones(spy):
    student = small_unet()
    teacher = small_unet(seed=1)
    x0, t, eps, y = small_batch()
    x_t = r.add_noise(x0, t, eps)
    ours = student(x_t, t, y)
    theirs = teacher(x_t, t, y).detach()
    denoise = ((ours[:3] - eps[:3]) ** 2).mean()
    distill = ((ours[3:] - theirs[3:]) ** 2).mean()
    calls = spy(r.UNet, "forward", lambda out, model, x, *_: (model, len(x)))
    found = r.losses(student, teacher, x0, t, eps, y)
    assert calls == [(student, 6), (teacher, 3)]
    assert_close(found, (denoise, distill))
    gradient = torch.autograd.grad(sum(found), student.parameters())
    exact = torch.autograd.grad(denoise + distill, student.parameters())
    assert_close(gradient, exact, rtol=1e-3, atol=1e-5)
    denoise, distill = r.losses(student, None, x0, t, eps, y)  # all rows are real
    assert_close(denoise, ((ours - eps) ** 2).mean())
    assert distill == 0


# ---- Part I: the Fisher
def papers_loss(model, x0, t, eps, y):
    abar = per_image(torch.tensor(ABAR)[t].float())
    eps_hat = model(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, y)
    return ((eps_hat - eps) ** 2).mean((1, 2, 3))


def gradients_one_by_one(model, batches, loss=papers_loss):
    """Per-sample gradients (n, D) of the trainable weights in float64, a backward pass each."""
    rows = []
    for batch in batches:
        for i in range(len(batch[0])):
            sample = [v[i : i + 1] for v in batch]
            value = loss(model, *sample).sum()
            g = torch.autograd.grad(value, r.trainable(model), materialize_grads=True)
            rows.append(r.flat(g).double())
    return torch.stack(rows)


def assert_fishers_are_right(model, x, y, n, fishers=FISHERS, error=1e-3, **loss):
    """They match per-sample gradients in eval mode, c* over fresh draws; the weights stay."""
    for module in model.modules():
        module.training = False  # without eval(), which may do more
    draws = generator(3)
    g = gradients_one_by_one(model, r.fisher_batches(x, y, n, draws, **loss), **loss)
    fresh = gradients_one_by_one(model, r.fisher_batches(x, y, n, draws, **loss), **loss)
    mean = g.mean(0)
    before = copy.deepcopy(model.train().state_dict())
    mu, c_star = r.rank1_fisher(model, x, y, n, generator(3), **loss)
    assert mu.dtype == c_star.dtype == torch.float32
    assert_close_to_its_largest(mu, mean, error)
    exact = (fresh @ mean).square().mean() / mean.norm() ** 4
    assert c_star.item() == pytest.approx(exact.item(), rel=error)
    if r.diagonal_fisher in fishers:
        diagonal = r.diagonal_fisher(model, x, y, n, generator(3), **loss)
        assert_close_to_its_largest(diagonal, g.square().mean(0), error)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("n", [10, 4000])
def test_fisher_samples_take_every_image_equally_often_with_its_label_at_random_times(n):
    images, _ = small_images(40)
    labels = torch.arange(40)  # an image's label is its number
    batches = [*r.fisher_batches(images, labels, n, generator())]
    x0, t, eps, y = [torch.cat(v) for v in zip(*batches)]
    assert x0.equal(r.to_float(images)[y])
    counts = y.bincount(minlength=40)
    assert (len(y), counts.min(), counts.max()) == (n, n // 40, math.ceil(n / 40))
    assert not y.equal(y.sort().values)
    assert len(t.unique()) > 0.9 * min(n, 1000)
    assert eps.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("n", [6, 10, 130])  # each image once, some twice, and two batches
def test_the_fishers_match_per_sample_gradients_c_star_over_fresh_draws(n):
    model = small_unet(channels=(8, 8, 8), dropout=0.5)
    assert_fishers_are_right(model, *small_images(), n)


class MergingLinear(torch.nn.Linear):
    """Its eval() changes its weights, as in LoRA layers that merge."""

    def train(self, mode=True):
        if not mode:
            self.weight.data *= 2
        return super().train(mode)


class Denoiser(torch.nn.Module):
    """A network as a researcher may have one; `kind` says what is special about it."""

    def __init__(self, kind=""):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.classes = torch.nn.Embedding(10, 16)
        self.net = MergingLinear(81, 64) if kind == "merging LoRA" else torch.nn.Linear(81, 64)
        self.again = torch.nn.Linear(81, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        if kind == "a module twice":
            self.again = self.net
        if kind == "tied weights":
            self.again.weight = self.net.weight
        if kind == "a frozen part":
            self.net.requires_grad_(False)
        if kind == "a closure":  # over a network that is not this one
            self.forward = Denoiser().forward
        if kind == "bfloat16":
            self.bfloat16()

    def forward(self, x, t, y):
        kind = self.kind
        if kind == "in place":
            x.mul_(2)
        inputs = torch.cat([x.flatten(1), self.classes(y), t[:, None] / 1000], 1)
        inputs = inputs.to(self.net.weight.dtype)
        h = torch.tanh(self.net(inputs)) + torch.tanh(self.again(2 * inputs))
        if kind == "batch norm":
            h = self.norm(h)
        if kind == "no_grad":
            with torch.no_grad():
                again = self.net(inputs)
            h = h * again
        if kind == "attention":
            h = h.view(-1, 8, 8)
            h, _ = self.attention(h, h, h)
        if kind == "mixes samples":
            h = h - h.mean(0)
        if kind == "draws":
            torch.rand(1)  # its output does not even depend on it
        if kind == "its own backward":
            h = h.clone()
            h.register_hook(lambda g: 2 * g.detach())
        return h.reshape(-1, 1, 8, 8)


RIGHT = ["in place", "batch norm", "no_grad", "a frozen part", "a module twice", "merging LoRA"]
RIGHT += ["attention", "bfloat16", "tied weights"]
WRONG = {  # kind of network: the Fishers that refuse it, the error's words
    "tied weights": (FISHERS[1:], "alone|tied"),
    "mixes samples": (FISHERS, "mixes samples"),
    "draws": (FISHERS, "draws at random|randomness"),
    "a closure": (FISHERS, "all are 0|not have been used"),
    "its own backward": (FISHERS[:1], "not have been used|grad"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_the_fishers_are_those_of_single_samples_for_networks_as_researchers_have_them(kind):
    fishers = FISHERS[:1] if kind in WRONG else FISHERS
    error = 0.05 if kind == "bfloat16" else 1e-3
    assert_fishers_are_right(Denoiser(kind), *small_images(20), 20, fishers, error)


@pytest.mark.parametrize("kind", WRONG)
def test_a_network_for_which_a_fisher_would_be_wrong_is_refused(kind):
    fishers, words = WRONG[kind]
    for fisher in fishers:
        with pytest.raises((ValueError, RuntimeError, FloatingPointError), match=words):
            taken(fisher, Denoiser(kind))


@pytest.mark.parametrize("scale", [1e-11, 1, 1e10])
def test_the_fishers_take_any_loss_of_single_samples_and_its_images_as_they_are(scale):
    features = torch.randn(12, 5)
    classes = torch.arange(12) % 3
    classifier = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    def loss(model, x0, t, eps, y):
        return scale * functional.cross_entropy(model(x0), y, reduction="none")

    assert_fishers_are_right(classifier, features, classes, 12, loss=loss)


@pytest.mark.parametrize("fisher", FISHERS)
def test_what_no_fisher_can_be_taken_of_is_an_error(fisher):
    x, y = small_images()
    with pytest.raises(ValueError, match="each image needs its class"):
        taken(fisher, Denoiser(), images=(x, y[:2]))
    broken = Denoiser()
    broken.classes.weight.data[4] = math.nan
    with pytest.raises(FloatingPointError):
        taken(fisher, broken)


@pytest.mark.parametrize("fisher", FISHERS)
def test_after_a_fisher_each_module_is_in_the_mode_that_it_was_in(fisher):
    model = Denoiser()
    model.net.eval()
    modes = [module.training for module in model.modules()]
    taken(fisher, model)
    assert [module.training for module in model.modules()] == modes


def test_processes_divide_the_work_of_a_fisher_and_of_a_training_step(monkeypatch):
    diagonal = taken(r.diagonal_fisher, Denoiser(), 130)  # two batches
    shares = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda v: shares.append(v.clone()))
    monkeypatch.setattr(r, "world", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(r, "rank", Mock(return_value=process))
        taken(r.diagonal_fisher, Denoiser(), 130)
    assert_close(sum(shares) / 130, diagonal)
    student = small_unet()
    batch = small_batch()
    loss = papers_loss(student, *[v[1::2] for v in batch]).mean()
    exact = torch.autograd.grad(loss / 2, student.parameters())
    r.train_step(student, None, None, torch.optim.SGD(student.parameters()), batch)
    found = r.flat(p.grad for p in student.parameters())
    assert_close_to_its_largest(found, r.flat(exact), 1e-3)


def test_gradients_of_a_scaled_identity_are_on_a_line_and_f_is_c_star_mu_mu():
    # Propositions 1 and 2, Theorem 1: eps_hat = (a^T b) x_t, linear in x_t, not in theta.
    model = torch.nn.Linear(2, 20, bias=False)  # its weight holds a and b
    model.forward = lambda x, t, y: (model.weight[:, 0] @ model.weight[:, 1]) * x
    mu, c_star = taken(r.rank1_fisher, model)
    draws = generator(3)
    [*r.fisher_batches(*small_images(12), 12, draws)]  # those of mu
    g = gradients_one_by_one(model, r.fisher_batches(*small_images(12), 12, draws))
    lengths = g.norm(dim=1)
    assert_close((g @ g.T).abs(), torch.outer(lengths, lengths), rtol=1e-4, atol=0)
    assert lengths.std() > 0.01 * lengths.mean()  # they differ in length: c(x_t)
    assert_close_to_its_largest(c_star * torch.outer(mu, mu), g.T @ g / 12, 1e-4)


def test_a_dot_product_of_millions_of_numbers_is_summed_in_float64():
    a = 1 + torch.rand(2_000_000)
    exact = math.fsum((a.double() * a.double()).tolist())
    assert r.dot(a, a) == pytest.approx(exact, rel=1e-12)


# ---- Part I: penalties, against the formula with a matrix F_k and theta*_k of each task
STARS = torch.randn(3, 50, generator=generator(1))  # theta*_k
THETA = STARS[2] + 0.1 * torch.randn(50, generator=generator(2))


def three_fishers(kind):
    """What add() takes, for each of three tasks."""
    v = 0.3 * torch.randn(3, 2, 50)
    c = 1 + torch.rand(3, 2)
    if kind is beyond.RankKPenalty:
        return [*zip(v, c)]
    if kind is r.Rank1Penalty:
        return [*zip(v[:, 0], c[:, 0])]
    H = v[:, 0].square()
    H[:, :5] = 0  # weights that matter to no task
    return [*H]


def as_matrix(fisher):
    """F: diagonal, or the sum of c_j v_j v_j^T."""
    if torch.is_tensor(fisher):
        return torch.diag(fisher)
    v, c = fisher
    v = v.view(-1, 50)
    return v.T @ (c.view(-1, 1) * v)


def penalty_of(kind, fishers, stars, lam=7.0):
    penalty = kind(lam)
    for fisher, theta_star in zip(fishers, stars):
        penalty.add(fisher, theta_star)
    return penalty


NUMBERS = {  # how many a penalty keeps of three tasks: theta* only once
    r.Rank1Penalty: 3 * (50 + 2) + 50,
    r.DiagonalPenalty: 2 * 50,
    beyond.RankKPenalty: 6 * (50 + 2) + 50,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_penalty_its_gradient_and_its_drift_equal_the_formula_with_stored_weights(kind):
    fishers = three_fishers(kind)
    theta = THETA.clone().requires_grad_()
    value = 0
    drift = []
    for fisher, star in zip(fishers, STARS):
        moved = theta - star
        value = value + 7 / 2 * moved @ as_matrix(fisher) @ moved
        if kind is not r.DiagonalPenalty:
            drift.append(fisher[0].view(-1, 50) @ moved)
    drift = torch.cat(drift or [(value / 3.5).sqrt()[None]])
    (gradient,) = torch.autograd.grad(value, theta)

    stars = STARS.clone().requires_grad_()  # as flat(model.parameters()) without a detach()
    penalty = penalty_of(kind, fishers, stars)
    for v in (stars.data, *itertools.chain(*fishers)):
        v.zero_()  # the penalty must have kept copies
    torch.save(vars(penalty), "penalty.pt")
    again = kind(0.0)
    assert again(THETA) == 0  # before the first task
    vars(again).update(torch.load("penalty.pt"))
    kept = [v.numel() for v in vars(again).values() if torch.is_tensor(v)]
    assert sum(kept) == NUMBERS[kind]

    again(theta).backward()
    assert_close(again(theta), value)
    assert_close(theta.grad, gradient, rtol=1e-4, atol=1e-4)
    assert_close(again.drift(THETA), drift, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(again(THETA), value)


def test_what_add_returns_for_result_json_is_c_star_and_the_length_of_mu_or_the_trace():
    mu = torch.tensor([3.0, 4.0])
    told = r.Rank1Penalty(1.0).add((mu, torch.tensor(2.0)), torch.zeros(2))
    assert told == pytest.approx({"c_star": 2, "mu_norm": 5, "energy": 2 * 25})
    assert r.DiagonalPenalty(1.0).add(mu, torch.zeros(2)) == {"trace": 7}


def test_a_penalty_refuses_fishers_of_other_weights_and_strengths_that_are_none():
    def assert_error(function, *given):
        with pytest.raises(ValueError, match="finite"):
            function(*given)

    theta = torch.ones(5)
    one = torch.tensor(1.0)
    for wrong in (-1.0, math.nan, math.inf):
        assert_error(r.Rank1Penalty, wrong)
        assert_error(r.DiagonalPenalty, wrong)
        assert_error(r.Rank1Penalty(1.0).add, (theta, wrong * one), theta)
    for wrong in (torch.ones(6), theta * math.nan):
        assert_error(r.Rank1Penalty(1.0).add, (wrong, one), theta)
        assert_error(r.DiagonalPenalty(1.0).add, wrong, theta)


def test_rank1_penalty_is_exact_for_millions_of_weights_in_float32():
    theta_star, mu, noise = torch.randn(3, 2_000_000)
    theta = theta_star + 1e-6 * noise  # mu^T theta - mu^T theta* would lose all digits
    along = mu.double() @ (theta.double() - theta_star.double())
    penalty = penalty_of(r.Rank1Penalty, [(mu, torch.tensor(2.5))], [theta_star])
    assert penalty(theta).item() == pytest.approx(7 / 2 * 2.5 * along.item() ** 2, rel=1e-3)


# ---- Part I: training
def test_a_training_step_is_one_step_of_adam_on_the_sum_of_the_papers_three_terms():
    student = small_unet()
    teacher = small_unet(seed=1)
    batch = small_batch(12)
    theta = weights_of(student)
    fisher = torch.ones_like(theta), torch.tensor(1e-4)  # its gradient is as large as the losses'
    penalty = penalty_of(r.Rank1Penalty, [fisher], [theta - 1e-4], lam=3.0)
    by_hand = copy.deepcopy(student)
    exact = [*r.losses(by_hand, teacher, *batch), penalty(r.flat(by_hand.parameters()))]
    assert min(exact) > 0
    sum(exact).backward()
    torch.optim.Adam(by_hand.parameters(), lr=1e-2, eps=1.0).step()
    for p in student.parameters():
        p.grad = torch.ones_like(p)  # of some earlier step
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, eps=1.0)
    terms = r.train_step(student, teacher, penalty, optimizer, batch)
    assert_close(terms, torch.stack(exact).detach(), rtol=1e-4, atol=1e-6)
    step = weights_of(by_hand) - theta
    assert_close_to_its_largest(weights_of(student) - theta, step, 1e-3)


def epoch_of(*when, replay=True):
    """x0, t, eps and labels of an epoch of 43 images and as many old ones, (4, 20, ..) each."""
    x, _ = small_images(86)
    y = torch.arange(86)  # an image's label is its number
    task = r.Data(x[:43], y[:43], x[:43], y[:43])
    old = (x[43:], y[43:]) if replay else None
    batches = [*r.epoch_batches(task, old, 10, *when)]
    return [torch.stack(v) for v in zip(*batches)]


def test_an_epoch_takes_each_image_once_in_random_order_with_as_many_replayed_ones():
    x0, _, _, labels = epoch_of(0, 1, 0)
    images, _ = small_images(86)
    assert x0.equal(r.to_float(images)[labels])
    real = labels[:, :10].flatten().tolist()
    replayed = labels[:, 10:].flatten().tolist()
    assert len(real) == len(set(real)) == 40  # four full batches
    assert real != sorted(real)
    assert max(real) < 43 <= min(replayed)
    assert len(set(replayed)) > 20


def test_every_purpose_has_a_generator_of_its_own_by_seed_task_epoch_and_dropout_by_process(
    spy, monkeypatch
):
    seeds = spy(r, "rng", lambda made, *_: made.initial_seed())
    first = epoch_of(5, 2, 3)[0]
    dropout = torch.rand(5)
    for when in ((6, 2, 3), (5, 3, 3), (5, 2, 4)):
        epoch_of(*when)
    assert len(seeds) == len(set(seeds)) == 4 * 4  # order, noise, replay, dropout
    assert epoch_of(5, 2, 3, replay=False)[0].equal(first[:, :10])  # one draw less changes no other
    monkeypatch.setattr(r, "rank", lambda: 1)
    assert epoch_of(5, 2, 3)[0].equal(first)
    assert not torch.rand(5).equal(dropout)


def test_afid_and_forgetting_equal_a_matrix_worked_by_hand():
    fid = [[4.0, None, None], [6.0, 10.0, None], [9.0, 12.0, 3.0]]
    assert r.afid_and_forgetting(fid) == ([4, 8, 8], pytest.approx((5 + 2 + 0) / 3))
    assert r.afid_and_forgetting([[4.0, 5.0, 9.0]]) == ([6], None)  # joint training


# ---- Part I: the loop over the tasks, on six images a class
def four_pixels(images):
    return images.flatten(1)[:, :4].double().numpy()


LABELS = torch.arange(60) // 6
GREYS = 26 * per_image(LABELS)  # a class is as bright as its label says
NOISE = torch.randint(20, (60, 1, 8, 8), generator=generator())
IMAGES = (GREYS + NOISE).to(torch.uint8)
TEST = torch.arange(60) % 6 < 5  # five of each class, upside down
DATA = r.Data(IMAGES, LABELS, IMAGES[TEST].flip(2), LABELS[TEST])


@pytest.fixture
def tiny(monkeypatch):
    """tiny(flag, ..) runs five tasks of two grey classes, three steps each; FIDs on four pixels."""
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: DATA, ""))
    monkeypatch.setattr(r, "classifier_features", lambda *_: four_pixels)
    monkeypatch.setattr(r, "METHODS", r.METHODS | beyond.METHODS)
    return lambda *argv, out=RUN: r.main([*TINY, "--out", str(out), *argv])


SHOWS = {  # what is used after the first task; by methods not named here, all three
    "joint": "",
    "finetune": "",
    "replay": "replay",
    "gd": "replay distill",
    "diag-only": "ewc",
    "rank1-only": "ewc",
}


@pytest.mark.parametrize("method", [*r.METHODS, *beyond.METHODS])
def test_each_methods_row_does_what_its_name_says(tiny, spy, method):
    shows = set(SHOWS.get(method, "replay distill ewc").split())
    joint = method == "joint"
    tasks = spy(r, "train_task", lambda _, cfg, state, task, replay, bar: (task, replay))
    result = tiny(f"--method={method}")
    log = read_log(RUN)  # one line per task
    for k, (task, replay) in enumerate(tasks):
        learned = range(10) if joint else range(2 * k, 2 * k + 2)
        assert task.y.unique().tolist() == [*learned]
        found = {name for name in ("distill", "ewc") if log[k][name] > 0}
        if replay:
            found.add("replay")
            assert replay[1].unique().tolist() == [*range(2 * k)]
        assert found == (shows if k > 0 else set())
    penalizes = "ewc" in shows
    assert (result["lam"] > 0) == penalizes
    assert len(result["fisher"]) == len(result["drift"]) == 4 * penalizes
    assert [row.count(None) for row in result["fid"]] == ([0] if joint else [4, 3, 2, 1, 0])
    assert (result["fid_pooled"] is not None) == joint


@pytest.mark.parametrize(("decay", "rates"), [("linear", [3, 2, 1]), ("none", [3, 3, 3])])
def test_each_task_has_its_own_teacher_adam_and_rate_and_ends_with_an_average_and_a_fisher(
    tiny, spy, monkeypatch, decay, rates
):
    def after_step(terms, model, teacher, penalty, optimizer, *rest):
        weights.append(weights_of(model))
        (steps,) = {int(state["step"]) for state in optimizer.state.values()}
        rate = round(1000 * optimizer.param_groups[0]["lr"])
        return steps, rate, model.training, bool(teacher) and teacher.training

    def after_task(_, cfg, state, task, *rest):
        return weights_of(state.model), task.x, task.y

    def fisher(model, x, y, n, generator):
        fishers.append((weights_of(model), x, y))
        return r.rank1_fisher(model, x, y, n, generator)

    weights = []
    fishers = []
    steps = spy(r, "train_step", after_step)
    learned = spy(r, "train_task", after_task)
    teachers = spy(r, "replay_pool", lambda _, cfg, teacher, *rest: r.flat(teacher.parameters()))
    monkeypatch.setitem(r.METHODS, "rank1", r.METHODS["rank1"]._replace(fisher=fisher))
    tiny("--ema=0.9", "--dropout=0.1", "--lr=3e-3", "--lr-decay", decay)
    assert steps == 5 * [(i + 1, rates[i], True, False) for i in range(3)]
    assert_close(fishers, learned[:4], rtol=0, atol=0)
    for k in range(1, 5):
        average = learned[k - 1][0]
        assert teachers[k - 1].equal(average)
        assert not teachers[k - 1].requires_grad
        for theta in weights[3 * k : 3 * k + 3]:
            average = 0.9 * average + 0.1 * theta
        assert_close(learned[k][0], average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_a_fid_is_of_test_images_and_of_samples_of_the_same_labels_and_noise(tiny, spy, method):
    def look(images, cfg, model, noise, y, steps, name):
        assert not model.training
        return name, images, noise, y

    drawn = spy(r, "sample_images", look)
    result = tiny("--method", method)
    drawn = [given for given in drawn if "task" in given[0]]
    for k, task in enumerate(r.split_tasks(DATA, 5)):
        _, images, noise, y = drawn[k - 5]  # after the last task
        assert y.equal(task.test_y)
        exact = r.frechet_distance(four_pixels(task.test_x), four_pixels(images))
        assert result["fid"][-1][k] == pytest.approx(exact)
    assert drawn[0][2].equal(drawn[-5][2])  # the first task's noise, whenever it is evaluated
    assert not drawn[0][2].equal(noise)
    if method == "joint":
        samples = torch.cat([images for _, images, _, _ in drawn])
        exact = r.frechet_distance(four_pixels(DATA.test_x), four_pixels(samples))
        assert result["fid_pooled"] == pytest.approx(exact)


def test_rank1_without_a_penalty_is_gd_to_the_last_digit(tiny):
    # So lambda 0 is the baseline: the Fisher's random draws change no others.
    assert tiny("--lam=0", out="a")["fid"] == tiny("--method=gd", out="b")["fid"]


def test_in_a_random_order_of_the_classes_labels_count_up_and_the_result_names_true_classes(
    tiny, spy
):
    tasks = spy(r, "train_task", lambda _, cfg, state, task, *rest: task)
    argv = ["--class-order=random", "--method=finetune"]
    order = tiny(*argv)["class_order"]
    assert sorted(order) == [*range(10)] != order
    for k, task in enumerate(tasks):
        assert task.y.unique().tolist() == [2 * k, 2 * k + 1]
        true = task.x.flatten(1).min(1).values // 26
        assert true.tolist() == [order[label] for label in task.y]
    assert tiny(*argv, "--seed=1", out="other")["class_order"] != order


# ---- Part II: the network
PARAMETERS = {  # of a UNet, and its norms' groups
    (1, 10): (37_191_681, 32),
    (3, 1000): (37_703_171, 32),
    (1, 10, (16,), 1): (41_793, 8),  # the authors' small network
}


@pytest.mark.parametrize("arguments", PARAMETERS)
def test_unet_has_as_many_parameters_as_the_papers(arguments):
    with torch.device("meta"):
        model = r.UNet(*arguments)
    count = sum(p.numel() for p in model.parameters())
    assert (count, model.conv_norm_out.num_groups) == PARAMETERS[arguments]


def test_unet_gives_the_outputs_that_were_kept_of_one_that_equalled_diffusers():
    model = r.UNet(1, 10, (8, 16, 24), layers_per_block=2)
    for k, p in enumerate(model.parameters()):
        p.data.copy_(torch.cos((k + 1) * torch.arange(p.numel())).view_as(p))
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    out = model(x, torch.tensor([777]), torch.tensor([9]))
    assert out[0, 0, ::3, 0].tolist() == pytest.approx([2.6712, 1.1729, 0.5195], abs=2e-3)


SIZES = [([128, 256, 256, 256], 2), ([8, 16, 24], 2), ([16], 1)]


@pytest.mark.parametrize(("channels", "layers"), SIZES)
def test_unet_and_diffusers_share_weights_and_sampler_and_give_the_same_images(channels, layers):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    cfg = settings(channels=channels, layers_per_block=layers)
    ours = r.UNet(1, 10, channels, layers).eval()
    theirs = bench.plain_network(cfg, ours)
    x = torch.randn(2, 1, 16, 16)
    y = torch.tensor([1, 9])
    with torch.no_grad():
        outputs = [model(x, torch.tensor([3, 777]), y) for model in (ours, theirs)]
    assert_close(*outputs, atol=1e-4, rtol=0)
    images = bench.plain_images(cfg, theirs, x, y, 10, "")
    assert_close(r.sample_images(cfg, ours, x, y, 10, ""), images, atol=1, rtol=0)


# ---- Part II: the data
def test_digits_are_all_there_and_limit_keeps_the_first_of_each_class():
    data = r.load_data("digits", Path())
    assert len(data.y) == 997
    assert len(data.test_y) == 800
    assert data.x.max() == 255
    few = r.limit_classes(data, 3)
    assert few.test_y.tolist() == few.y.tolist() == [*np.arange(10).repeat(3)]
    assert few.x[27:].equal(data.x[data.y == 9][:3])


def test_tasks_hold_every_class_once_in_the_order_of_their_labels():
    y = torch.randint(100, (6000,))
    x = y[:, None].to(torch.uint8)  # a pixel shows its label
    seen = 0
    for k, task in enumerate(r.split_tasks(r.Data(x, y, x[::3], y[::3]), 20)):
        for images, labels in (task[:2], task[2:]):
            assert labels.unique().tolist() == [*range(5 * k, 5 * k + 5)]
            assert images[:, 0].equal(labels)
            seen += len(labels)
    assert seen == 6000 + 2000


def test_a_dataset_of_torchvisions_is_read_as_32x32_pixels(monkeypatch):
    def dataset(data_dir, train, download):
        return SimpleNamespace(data=pixels[int(train)], targets=labels[int(train)])

    monkeypatch.setattr(torchvision.datasets, "MNIST", dataset)
    labels = [[5, 6, 7], [2, 3, 4]]
    pixels = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)  # MNIST has tensors
    data = r.load_torchvision("MNIST", Path())
    padded = functional.pad(pixels, (2, 2, 2, 2))
    assert torch.stack([data.test_x, data.x])[:, :, 0].equal(padded)
    assert torch.stack([data.test_y, data.y]).tolist() == labels

    pixels = torch.randint(256, (2, 3, 32, 32, 3), dtype=torch.uint8).numpy()  # CIFAR-10 arrays
    data = r.load_torchvision("MNIST", Path())
    assert np.array_equal(data.x.permute(0, 2, 3, 1), pixels[1])


NPZ = Path("imagenet32/train_data_batch_7.npz")


def write_npz():
    """The downsampled ImageNet's files, of classes 1..20; a pixel shows its label."""
    NPZ.parent.mkdir()
    for name in [*(f"train_data_batch_{k}" for k in range(1, 11)), "val_data"]:
        labels = np.arange(40) % 20 + 1
        data = np.full((40, 3072), 200, np.uint8)
        data[:, 1024 + 32] = labels  # channel 1, row 1, column 0
        np.savez(NPZ.with_name(f"{name}.npz"), data=data, labels=labels)


def test_the_downsampled_imagenet_is_read_class_after_class_from_label_0_on():
    write_npz()
    data = r.load_data("imagenet32", Path())
    assert data.x.shape == (400, 3, 32, 32)
    for x, y in (data[:2], data[2:]):
        assert y.tolist() == sorted([*range(20)] * (len(y) // 20))
        assert x[:, 1, 1, 0].equal((y + 1).to(torch.uint8))


def write_pickle():
    labels = np.array([1] * 40, dtype=object)
    np.savez(NPZ, data=np.full((40, 3072), 200, np.uint8), labels=labels)


BAD_FILES = {
    "missing": lambda: NPZ.unlink(),
    "damaged": lambda: NPZ.write_bytes(NPZ.read_bytes()[:5000]),
    "pickled": write_pickle,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_data_that_cannot_be_read_is_refused_with_what_is_needed_and_where(assert_refused, kind):
    write_npz()
    BAD_FILES[kind]()
    words = "imagenet32 imagenet32/{train_data_batch_1..10,val_data}.npz --data-dir ."
    assert_refused(words, r.main, ["--dataset=imagenet32", "--data-dir=."])
    words = "cifar10 cifar-10-python.tar.gz network --data-dir ."
    assert_refused(words, r.main, ["--dataset=cifar10", "--data-dir=."])


GOOD = r.Data(*small_images(40), *small_images(20))
UNFIT = [  # what a loader returns in place of parts of GOOD, and the words of the refusal
    ({"x": GOOD.x.float() / 255}, "training images uint8 float32 (40, 1, 8, 8)"),
    ({"x": GOOD.x // 16}, "training images 0..255 largest 15"),
    ({"test_x": GOOD.test_x[..., 4:, 4:]}, "test images (20, 1, 4, 4)"),
    ({"y": GOOD.test_y}, "training labels (20,) 40 images"),
    ({"y": GOOD.y + 1, "test_y": GOOD.test_y + 1}, "training labels 0..10"),
    ({"test_y": GOOD.test_y.clamp(max=8)}, "test labels 0..9"),
]


@pytest.mark.parametrize(("wrong", "words"), UNFIT)
def test_images_and_labels_that_do_not_fit_together_are_refused_with_what_was_found(
    assert_refused, monkeypatch, wrong, words
):
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: GOOD._replace(**wrong), ""))
    assert_refused(f"digits {words}", r.main, QUICK)


# ---- Part II: the metric
@pytest.mark.parametrize("n", [200, 5])  # more images than features, and fewer
def test_frechet_distance_equals_clean_fids(n):
    a, b = np.random.default_rng(0).normal(size=(2, n, 8))
    b = 2 * b + 1
    assert r.frechet_distance(a, b) == pytest.approx(bench.plain_distance(a, b), rel=1e-3)


def test_inception_gets_rgb_in_0_to_255_and_resizes_itself(monkeypatch):
    build = Mock(return_value=lambda batch: batch.flatten(1))  # the features are its input
    monkeypatch.setattr(cleanfid.features, "build_feature_extractor", build)
    grey, _ = small_images(250)
    features = r.inception_features(CPU)(grey)
    rgb = torch.cat([grey, grey, grey], 1)
    assert np.array_equal(features, rgb.flatten(1))
    assert build.call_args.args[0] == "legacy_tensorflow"


def test_without_inceptions_weights_a_refusal_names_the_classifier(assert_refused, monkeypatch):
    monkeypatch.setattr(cleanfid.features.InceptionV3W, "__init__", urllib.request.urlopen)
    assert_refused("no network --fid classifier", r.main, ["--fid=inception"])


def test_classifier_is_good_trained_once_and_a_damaged_file_of_it_refused(
    monkeypatch, capsys, assert_refused
):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    data = r.load_data("digits", Path())
    first = r.classifier_features("digits", data, CPU)(data.test_x)
    told = capsys.readouterr().out
    assert float(re.search(r"right on ([\d.]+)% of the test images", told)[1]) > 95
    (file,) = Path("cache/rank1_ewc").iterdir()
    written = file.stat().st_mtime_ns
    second = r.classifier_features("digits", data, CPU)(data.test_x)
    assert file.stat().st_mtime_ns == written
    assert first.shape == (800, 64)
    assert np.array_equal(first, second)
    file.write_bytes(file.read_bytes()[:100])
    assert_refused(file.name, r.main, QUICK)


def test_real_images_for_comparison_are_as_many_of_each_class_as_the_test_has():
    x = per_image(torch.arange(90, dtype=torch.uint8))
    y = torch.arange(90) // 80  # 80 of one class, 10 of the other
    task = r.Data(x, y, x[77:83], y[77:83])  # three of each
    features = Mock(side_effect=four_pixels)
    state = SimpleNamespace(fid_real=[])
    r.record_fid_of_real_images(settings(), state, [task], [np.zeros((6, 1))], features)
    drawn = features.call_args.args[0].flatten().tolist()
    assert len(set(drawn)) == 6
    assert max(drawn[:3]) < 80 <= min(drawn[3:])
    assert drawn[:3] != [0, 1, 2]


# ---- Part III: importing, settings, files
IMPORTS = """
import os, signal, sys, torch
def state():
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    handler = signal.getsignal(signal.SIGTERM)
    torch_state = torch.get_num_threads(), torch.initial_seed(), flags
    return dict(os.environ), sys.stdout, handler, torch_state
before = state()
from rank1_ewc import rank1_fisher
assert state() == before
print({"cleanfid", "filelock", "sklearn", "matplotlib", "pandas"} & {*sys.modules})
"""


def python(*arguments, check=True):
    """Run a Python that finds the script. -> the finished process, with what it printed."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, text=True, check=check, capture_output=True, timeout=200)


def test_importing_changes_nothing_and_loads_nothing_heavy(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # importing torchvision sets it
    assert python("-c", IMPORTS).stdout == "set()\n"


PAPER = {
    "epochs": 200,
    "batch_size": 128,
    "lr": 2e-4,
    "lr_decay": "none",
    "lam": 15000,
    "fisher_samples": 10_000,
    "replay_per_class": 5000,
    "sample_steps": 50,
    "tasks": 5,
    "class_order": "label",
    "dropout": 0,
}


def test_the_papers_settings_hold_but_for_a_datasets_row_and_then_the_command_line():
    fashion = vars(r.parse_args(["--dataset=fashion"]))
    assert fashion | PAPER == fashion
    imagenet = r.parse_args(["--dataset=imagenet32"])
    assert (imagenet.epochs, imagenet.replay_per_class, imagenet.tasks) == (100, 1300, 20)
    assert imagenet.channels == [128, 256, 256, 256]
    digits = r.parse_args(["--epochs=3"])
    assert (digits.channels, digits.epochs, digits.lam) == ([16, 32], 3, 10)
    assert digits.out == Path("runs/digits/rank1+seed=0")
    assert r.parse_args(["--out=~/x"]).out == Path.home() / "x"


@pytest.mark.parametrize(("argv", "lam"), [([], 10), (["--dataset=mnist"], 15000)])
def test_help_shows_the_defaults_of_the_dataset_on_the_line(capsys, argv, lam):
    with pytest.raises(SystemExit):
        r.parse_args([*argv, "--help"])
    assert f"(default: {lam}.0)" in " ".join(capsys.readouterr().out.split())


REFUSED = """
--dataset=digit
--fid=vgg
--device=tpu
--device=cuda:99
--frobnicate
--lam=-1
--lam=inf
--lam=nan
--lam=many
--lr=-1
--limit=0
--epochs=0
--epochs=1.5
--channels=0
--channels=32;64
--seed=a
--method=rank3 | --method rank3 gd diag rank1
--sample-steps=1001 | --sample-steps 1000
--replay-steps=1001 | --replay-steps 1000
--tasks=3 | --tasks 3 10 divisor
--channels=8,12 | --channels multiples of 8
--channels=8,8,8,8 | --channels levels 8x8
--dropout=2 | --dropout probability
--out=/dev/null/out | /dev/null/out written
--lr=1e12 | task 1 finite epoch --lr 1e+12 --lam
"""


@pytest.mark.parametrize("row", REFUSED.strip().splitlines())
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(assert_refused, row):
    flag, _, words = row.partition(" | ")
    assert_refused(words or flag.replace("=", " "), r.main, [flag])


def test_an_unfinished_file_never_takes_the_place_of_a_whole_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), r.atomic_write(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file": b"old"}


# ---- Part III: runs that survive
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(flag, ..) is the folder of a whole run on digits, made once for all tests."""

    @functools.cache
    def of(*argv):
        folder = tmp_path_factory.mktemp("finished")
        r.main([*QUICK, "--out", str(folder), *argv])
        return folder

    return of


@pytest.mark.slow
def test_a_run_from_the_command_line_leaves_its_results():
    told = python(SCRIPT, *QUICK, "--out=run").stdout
    assert "digits, rank1: FID of each task (digits-classifier)" in told
    result = r.read_result(RUN / "result.json")
    assert (result["dataset"], result["method"], result["script"]) == ("digits", "rank1", r.SCRIPT)
    assert [line["task"] for line in read_log(RUN)] == [1, 2, 3, 4, 5]
    weights = torch.load(RUN / "model.pt")
    r.UNet(1, 10, (16,), 1).load_state_dict(weights)
    files = {"checkpoint.pt", "log.jsonl", "model.pt", "result.json", ".lock", "samples-task1.png"}
    for k in range(2, 6):
        files |= {f"samples-task{k}.png", f"replay-task{k}.png"}
    assert contents(RUN).keys() == files


def interrupted(tiny, what, nth, *argv):
    """A run with a checkpoint after every epoch, stopped by Ctrl-C at the nth call of r.`what`."""
    function = getattr(r, what)
    turns = itertools.count(1)

    def stops(*given):
        if next(turns) == nth:
            raise KeyboardInterrupt
        return function(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(r, "CHECKPOINT_SECONDS", -1)
        patch.setattr(r, what, stops)
        tiny(*argv)
    assert stopped.value.code == 130


STOPS = [
    ("train_step", 11, "--dropout=0.1 --ema=0.9", "1 of 5 tasks and 1 epochs"),
    ("frechet_distance", 7, "--dropout=0.1", "1 of 5 tasks and 2 epochs"),
    ("write_json", 1, "--method=joint", "1 of 5 tasks and 0 epochs"),  # only the result is missing
    ("train_step", 11, "--method=rank1-proximal", "1 of 5 tasks and 1 epochs"),
]


@pytest.mark.parametrize(("what", "nth", "flags", "at"), STOPS)
def test_after_ctrl_c_the_same_command_ends_the_run_the_same(tiny, capsys, what, nth, flags, at):
    argv = ["--epochs=2", *flags.split()]
    interrupted(tiny, what, nth, *argv)
    assert "interrupted; the same command, without --fresh, goes on" in capsys.readouterr().err
    assert not (RUN / "result.json").exists()
    stopped = tiny(*argv)
    assert f"going on from run/checkpoint.pt: {at}" in capsys.readouterr().out
    whole = tiny(*argv, out="whole")
    assert stopped | {"seconds": 0} == whole | {"seconds": 0}
    assert read_log(RUN) == read_log(Path("whole"))
    assert_close(torch.load("run/model.pt"), torch.load("whole/model.pt"), rtol=0, atol=0)


def test_checkpoints_come_after_each_task_and_about_once_a_minute_within_it(tiny, spy, monkeypatch):
    clock = itertools.count(step=25)  # each reading is 25 seconds later
    monkeypatch.setattr(r.time, "monotonic", lambda: next(clock))
    saved = spy(r, "save_checkpoint", lambda _, cfg, state: (state.task, state.epoch))
    tiny("--epochs=9", "--method=finetune")
    assert [task for task, epoch in saved if epoch == 0] == [1, 2, 3, 4, 5]
    assert 10 <= len(saved) <= 30  # after some of 45 epochs


def test_a_finished_run_given_again_prints_its_result_and_does_nothing(tiny, monkeypatch, capsys):
    tiny()
    before = contents(RUN)
    monkeypatch.setitem(r.LOADERS, "digits", None)  # not even the data is read
    capsys.readouterr()
    result = tiny()
    assert f"AFID {result['afid'][-1]:.2f}" in capsys.readouterr().out
    assert contents(RUN) == before


def test_fresh_starts_over_and_the_old_run_does_not_outlive_it(tiny):
    first = tiny("--seed=1")
    interrupted(tiny, "train_step", 2, "--seed=2", "--fresh")
    second = tiny("--seed=2")
    assert first["fid"] != second["fid"]
    tiny("--method=joint", "--fresh")
    assert [path.name for path in RUN.glob("*.png")] == ["samples-task5.png"]


@pytest.mark.parametrize("name", ["checkpoint.pt", "result.json"])
def test_a_file_of_other_settings_another_script_or_a_damaged_one_is_refused_and_kept(
    tiny, monkeypatch, assert_refused, name
):
    tiny()
    path = RUN / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = [b"", whole[:middle]]
    if name == "checkpoint.pt":
        (RUN / "result.json").unlink()
        damaged.append(whole[:middle] + bytes(200) + whole[middle + 200 :])  # torch.load accepts it
        torch.save({"other": Mock}, "pickle")
        damaged.append(Path("pickle").read_bytes())
    assert_refused(f"{path} --lam 10.0 11.0 --fresh --out", tiny, "--lam=11")
    with monkeypatch.context() as patch:
        patch.setattr(r, "SCRIPT", "another state")
        assert_refused(f"{path} script another state --fresh bring back", tiny)
    assert path.read_bytes() == whole
    for content in damaged:
        path.write_bytes(content)
        assert_refused(f"{path} damaged --fresh", tiny)
        assert path.read_bytes() == content


def test_a_run_goes_on_with_the_same_images_and_the_same_network_of_the_fid_alone(
    tiny, monkeypatch, assert_refused
):
    def other_features(*_):
        return lambda images: 1.01 * four_pixels(images)

    other = DATA._replace(test_x=DATA.test_x.flip(3))
    interrupted(tiny, "train_step", 7)
    with monkeypatch.context() as patch:
        patch.setitem(r.LOADERS, "digits", (lambda _: other, ""))
        assert_refused("checkpoint.pt other images --fresh", tiny)
    with monkeypatch.context() as patch:
        patch.setattr(r, "classifier_features", other_features)
        assert_refused("another network FID --fresh", tiny)
    tiny()


def test_a_model_without_its_checkpoint_is_not_overwritten(tiny, assert_refused):
    RUN.mkdir()
    (RUN / "model.pt").write_bytes(b"the user's own")
    assert_refused("model.pt checkpoint is gone --out", tiny)
    assert contents(RUN)["model.pt"] == b"the user's own"


def test_weights_and_samples_that_are_not_finite_stop_a_run(tiny, spy, assert_refused):
    with pytest.raises(FloatingPointError, match="image is not finite"):
        r.to_uint8(torch.tensor([0.0, math.nan]))
    with pytest.raises(FloatingPointError, match="features of some images"):
        r.frechet_distance(np.full((3, 2), np.nan), np.ones((3, 2)))
    steps = itertools.count(1)

    def diverge(terms, model, *_):
        if next(steps) == 3:  # the last of the first task: its loss was computed before
            r.trainable(model)[0].data[0] = math.inf

    spy(r, "train_step", diverge)
    assert_refused("weight not finite task 1 --lr", tiny)


def test_a_folder_that_another_run_writes_into_is_refused_and_left_alone(tiny, assert_refused):
    tiny()
    before = contents(RUN)
    with filelock.FileLock(RUN / ".lock"):
        assert_refused("another run run: --out", tiny, "--fresh")
    assert contents(RUN) == before


def test_an_error_that_nobody_foresaw_ends_a_run_with_its_traceback(tiny, monkeypatch):
    monkeypatch.setattr(r, "losses", Mock(side_effect=ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        tiny()


@pytest.mark.slow
def test_sigterm_ends_a_run_at_once_as_ctrl_c_does_with_its_own_status():
    command = [sys.executable, str(SCRIPT), *QUICK, "--epochs=100000", "--out=run"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while run.poll() is None and not (RUN / ".lock").exists():
            time.sleep(0.1)
        time.sleep(3)
        run.terminate()
        _, printed = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 143
    assert "interrupted; the same command" in printed.splitlines()[-1]


@pytest.mark.parametrize("method", ["rank1", "diag"])
def test_bf16_trains_and_samples_in_bfloat16_but_weights_and_fisher_are_float32(tiny, spy, method):
    def since(*_):
        dtypes = set(outputs)
        outputs.clear()
        return dtypes

    outputs = spy(r.UNet, "forward", lambda eps, *_: eps.dtype)
    steps = spy(r, "train_step", since)
    sampled = spy(r, "sample_images", since)
    fishers = spy(r.METHODS[method].penalty, "add", since)
    tiny("--bf16", "--method", method)
    half = [{torch.bfloat16}]
    assert steps == half * 15
    assert sampled == half * len(sampled)
    assert fishers == [{torch.float32}] * 4
    weights = torch.load(RUN / "model.pt")
    assert {v.dtype for v in weights.values()} == {torch.float32}


@needs_cuda
def test_a_run_on_cuda_goes_on_after_an_interrupt(tiny):
    interrupted(tiny, "train_step", 11, "--epochs=2", "--device=cuda")
    assert len(tiny("--epochs=2", "--device=cuda")["fid"]) == 5


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
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TWO = [*TORCHRUN, "--no-python", sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "status", "error"), [([], -signal.SIGKILL, 0), (TWO, 1, 0.01)]
)
def test_one_process_goes_on_where_one_or_two_were_killed(finished, launcher, status, error):
    expected = r.read_result(finished("--epochs=2") / "result.json")["afid"]
    argv = [*QUICK, "--epochs=2", "--out=run"]
    killed = python(*launcher, "-c", KILLS_ITSELF, *argv, check=False)
    assert killed.returncode == status
    assert len(read_log(RUN)) == 5  # of seven checkpoints two were at a task's end
    assert r.main(argv)["afid"] == pytest.approx(expected, rel=error)
    assert [*RUN.glob(".rank1_ewc-*")] == []  # the half-written file is gone


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(finished):
    python(*TORCHRUN, SCRIPT, *QUICK, "--epochs=2", "--out=run")
    folder = finished("--epochs=2")
    for ours, theirs in zip(read_log(RUN)[:3], read_log(folder)):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    two = r.read_result(RUN / "result.json")
    one = r.read_result(folder / "result.json")
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["fisher"][0] == pytest.approx(one["fisher"][0], rel=1e-4)
    assert two["afid"] == pytest.approx(one["afid"], rel=1e-2)
    assert contents(RUN).keys() == contents(folder).keys()


# ---- results/beyond.py: further Fishers and penalties, another dataset
def test_rank_k_fisher_is_the_best_of_rank_k_for_the_per_sample_gradients():
    batches = r.fisher_batches(*small_images(12), 12, generator(3))
    g = gradients_one_by_one(Denoiser(), batches)  # F = g^T g / 12
    _, exact, directions = torch.linalg.svd(g / math.sqrt(12), full_matrices=False)
    v, values = taken(functools.partial(beyond.rank_k_fisher, k=4), Denoiser())
    assert_close(values.double(), exact[:4] ** 2, rtol=1e-3, atol=0)
    cosines = v.double() @ directions[:4].T
    assert_close(cosines.abs(), torch.eye(4).double(), rtol=0, atol=1e-2)


def test_the_isotropic_fisher_has_the_trace_of_the_diagonal_and_no_direction():
    alike = taken(beyond.isotropic_fisher, Denoiser())
    assert_close(alike.sum(), taken(r.diagonal_fisher, Denoiser()).sum())
    assert len(alike.unique()) == 1


def test_the_shuffled_fisher_is_that_of_shuffled_pixels_at_the_energy_of_the_true_images(spy):
    images, y = small_images(40)
    images[:, :, :4] = 0  # pictures whose top differs from the bottom
    fishers = spy(r, "rank1_fisher", lambda found, model, x, *_: (x, *found))
    mu, c_star, told = beyond.shuffled_fisher(Denoiser(), images, y, 400, generator(3))
    (_, true_mu, true_c_star), (shuffled, own_mu, own_c_star) = fishers
    assert shuffled.flatten(1).sort().values.equal(images.flatten(1).sort().values)
    assert 0.4 < shuffled[:, :, :4].count_nonzero() / images.count_nonzero() < 0.6
    assert mu.equal(own_mu)
    true_energy = true_c_star * true_mu.norm() ** 2
    assert_close(c_star * mu.norm() ** 2, true_energy)
    own_energy = own_c_star * mu.norm() ** 2
    cosine = torch.cosine_similarity(mu, true_mu, 0)
    exact = {"cos_true_mu": cosine.item(), "own_energy": own_energy.item()}
    assert told == pytest.approx(exact, rel=1e-4)


def test_a_part_of_the_timesteps_is_taken_evenly_and_with_the_same_images_and_noise():
    t = beyond.squeezed(torch.arange(1000), 300, 550)
    assert t.equal(torch.arange(300, 550).repeat_interleave(4))
    x0, _, eps, y = small_batch(10)
    found = beyond.loss_in(300, 550)(Denoiser(), x0, torch.arange(0, 1000, 100), eps, y)
    assert_close(found, r.per_sample_loss(Denoiser(), x0, t[::100], eps, y))


@pytest.mark.parametrize("eta", [1e-3, 10.0])
def test_the_proximal_step_minimizes_penalty_plus_distance(eta):
    fishers = three_fishers(r.Rank1Penalty)
    model = torch.nn.Linear(50, 1, bias=False)
    model.weight.data.copy_(THETA)
    penalty_of(beyond.ProximalPenalty, fishers, STARS).after_step(model, eta)
    z = weights_of(model).requires_grad_()
    penalty = penalty_of(r.Rank1Penalty, fishers, STARS)
    (penalty(z) + (z - THETA).square().sum() / (2 * eta)).backward()
    assert z.grad.norm() < 1e-3 * ((z - THETA) / eta).norm()


def test_fashion16_has_the_means_of_2x2_pixels_of_a_thousand_images_a_class(monkeypatch):
    y = torch.arange(12000) // 1200
    x = torch.randint(256, (12000, 1, 2, 2), dtype=torch.uint8)
    monkeypatch.setattr(r, "load_torchvision", lambda *_: (x, y, x, y))
    data = beyond.load_fashion16(Path())
    assert data.y.equal(torch.arange(10000) // 1000)
    assert data.test_y.equal(torch.arange(2000) // 200)
    means = x.float().mean((1, 2, 3)).view(10, 1200)
    assert_close(data.x.view(10, 1000).float(), means[:, :1000], atol=0.5, rtol=0)


@pytest.mark.slow
def test_beyond_takes_the_scripts_flags_and_its_runs_are_told_from_the_scripts_own():
    argv = ["--method=rank4", "--tasks=2", *QUICK, "--limit=9", "--out=run"]
    python("-m", "results.beyond", *argv)
    result = r.read_result(RUN / "result.json")
    assert result["method"] == "rank4"
    assert "with beyond.py" in result["script"]


# ---- results/geometry.py: the Fisher of a trained model
def test_figure_1_goes_from_the_image_to_the_mean_image_of_its_class_as_proposition_1_says():
    means = torch.tensor([0.3, -0.5])  # a pixel of class y is N(means[y], 0.04)

    def best(x, t, y):  # E[eps | x_t, y]
        abar = per_image(r.alphas_cumprod(CPU)[t])
        mean = per_image(means[y])
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * 0.04 + 1 - abar)

    y = torch.arange(1000) % 2
    x = r.to_uint8(per_image(means[y]) + 0.2 * torch.randn(1000, 1, 4, 4))
    numbers, _ = geometry.figure_1(best, r.Data(x, y, x, y), None)
    abar = ABAR[numbers["t"]]
    high = (0.3**2 + 0.5**2) / 2
    known = abar * 0.04 / (abar * 0.04 + 1 - abar)  # share of a pixel's variance that x_t reveals
    exact = {"high noise": high, "low noise": high + 0.04, "mse": high + 0.04 * known}
    for name, value in exact.items():
        assert numbers[name] == pytest.approx(abar * value, rel=0.02)


def test_where_all_gradients_lie_on_a_line_its_geometry_is_that_of_rank_1(monkeypatch):
    monkeypatch.setattr(beyond, "GRADIENTS", 12)
    direction = torch.randn(16)
    data = r.Data(*small_images(), *small_images())

    def loss(model, x0, t, eps, y):  # g_i = c_i v, with c_i from the noise
        return (2 + eps.flatten(1)[:, 0]) * model(direction)

    model = torch.nn.Linear(16, 1, bias=False)
    numbers, _, cos = geometry.geometry(model, data, loss=loss)
    assert_close(cos, torch.ones(12))
    assert numbers["top_share"] == pytest.approx(1, rel=1e-4)
    assert numbers["error"]["c* mu mu^T"] == pytest.approx(0, abs=1e-3)
    assert numbers["error"]["mu mu^T"] == pytest.approx(abs(1 - 1 / numbers["c_star"]), rel=1e-4)
    assert numbers["eigenvalues"][0] == pytest.approx(numbers["energy"], rel=1e-4)


def test_a_vaes_loss_is_squared_error_and_weighted_divergence_from_a_normal_distribution():
    vae = geometry.VAE(16)
    x0, eps = torch.randn(2, 5, 1, 4, 4)
    x = x0.flatten(1)
    image, mean, log_var = vae(x, eps.flatten(1)[:, :8])
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(posterior, prior).sum(1)
    found = geometry.vae_loss(vae, x0, None, eps, None, kl_weight=0.3)
    assert_close(found, (image - x).square().mean(1) + 0.3 * kl)


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["1", "2", "3", "vae", "movement"])
def test_a_figure_of_a_run_or_its_first_task_comes_with_its_numbers(finished, monkeypatch, figure):
    monkeypatch.setattr(beyond, "GRADIENTS", 20)
    monkeypatch.setattr(geometry, "TIMES", [100, 700])
    monkeypatch.setattr(geometry, "VAE_STEPS", [0, 5])
    of = ["--first-task", " ".join(QUICK)] if figure == "movement" else [str(finished())]
    geometry.main([figure, *of, "--to", "new/figure"])
    numbers = json.loads(text_of("new/figure.json"))
    assert numbers["samples"] == (200 if figure == "movement" else 20)
    assert Path("new/figure.png").exists()


# ---- results/report.py: tables and pictures of finished runs
def hand_made_run(folder, method="gd", seed=0, afid=20.0, flags=None, **parts):
    """Write an invented result.json of two tasks, with these `parts`, and a picture."""
    run = {
        "dataset": "fashion",
        "method": method,
        "lam": 0.0,
        "seed": seed,
        "fid_features": "inception",
        "fid": [[5.0, None], [afid + 2, afid - 2]],
        "fid_real": [1.0, 1.0],
        "fid_pooled": None,
        "fisher": [],
        "script": "0123",
    } | parts
    run["afid"], run["forgetting"] = r.afid_and_forgetting(run["fid"])
    usual = r.settings_of(r.parse_args(["--dataset=fashion"]))
    run["config"] = usual | {"method": method, "dataset": run["dataset"]} | (flags or {})
    r.write_json(Path(folder, "result.json"), run)
    torchvision.utils.save_image(torch.zeros(3, 70, 346), Path(folder, "samples-task1.png"))


def reported(measure="AFID"):
    """The lines of Table 1's CSV about a measure, indexed by method."""
    report.main(["runs"])
    lines = pd.read_csv("runs/table1.csv", dtype=str, keep_default_na=False)
    return lines[lines["measure"] == measure].set_index("method")


def test_table_1_has_means_errors_differences_from_gd_the_papers_numbers_and_both_pictures():
    hand_made_run("runs/gd0", "gd", 0, 20.0)
    hand_made_run("runs/gd1", "gd", 1, 26.0)
    hand_made_run("runs/joint", "joint", fid=[[20.0, 20.0]], fid_pooled=6.0)
    hand_made_run("runs/rank1", "rank1", 0, 18.0, lam=10.0, fisher=[{"energy": 1.5}])
    lines = reported()
    assert [*lines.loc["gd", ["mean", "standard_error"]]] == ["23", "3"]
    assert [*lines.loc["rank1", ["against", "difference", "curvature"]]] == ["gd", "-2", "15"]
    text = text_of("runs/table1.md")
    for words in ("15.4 / 0.9", "| 6.0 ", "lam 10 (paper 15000)"):
        assert words in text
    assert {path.name for path in Path("runs").glob("*.png")} == {"figure4.png", "figure5.png"}


def test_the_baseline_of_a_run_is_gd_alone_and_of_gd_with_a_flag_gd_without_it():
    ema = {"ema": 0.9}
    pool = {"replay_per_class": 10}
    hand_made_run("runs/gd")
    hand_made_run("runs/ema", flags=ema)
    hand_made_run("runs/pool", flags=pool)
    hand_made_run("runs/both", flags=ema | pool)
    hand_made_run("runs/mine", "mine")
    hand_made_run("runs/rank1", "rank1", lam=10.0)
    hand_made_run("runs/rank1 seed", "rank1", 1, lam=10.0)
    hand_made_run("runs/rank1 ema", "rank1", lam=10.0, flags=ema)
    hand_made_run("runs/rank1 epochs", "rank1", lam=10.0, flags={"epochs": 7})
    lines = reported()
    assert lines["against"].to_dict() == {
        "gd": "",
        "gd --ema 0.9": "gd",
        "gd --replay-per-class 10": "gd",
        "gd --replay-per-class 10 --ema 0.9": "",  # two baselines fit equally well
        "rank1": "gd",
        "rank1 --ema 0.9": "gd --ema 0.9",
        "rank1 --epochs 7": "",
        "mine": "gd",  # a method of your own
    }
    assert lines.loc["rank1", "pairs"] == "1"


REFUSED_RUNS = {
    "are the same row and seed": {},
    "damaged": {"fid": [[5.0, None]]},
    "learned different data": {"method": "rank1", "data": "cdef"},
    "network FID": {"method": "rank1", "fid_real": [1.0, 1.001]},
}


@pytest.mark.parametrize("words", REFUSED_RUNS)
def test_runs_that_cannot_be_reported_together_are_refused_in_one_line(assert_refused, words):
    hand_made_run("runs/a", data="0123")
    hand_made_run("runs/b", **REFUSED_RUNS[words])
    assert_refused(f"{words} runs/b", report.main, ["runs"])


@pytest.mark.parametrize("flags", ["--over=lr", "--over=rate --to=x", "--rows=gd", "--summary"])
def test_a_report_without_a_name_or_over_no_setting_is_refused(assert_refused, flags):
    hand_made_run("runs/gd")
    word = "rate" if "rate" in flags else "--to"
    assert_refused(word, report.main, ["runs", *flags.split()])


def test_a_comparison_with_another_row_has_the_interval_of_a_paired_t_test_and_bonferronis():
    ours = [18.5, 25.0, 23.0]
    theirs = [20.0, 26.0, 22.0]
    for seed in range(3):
        hand_made_run(f"rank1-eig/{seed}", "rank1-eig", seed, ours[seed])
        hand_made_run(f"rank1/{seed}", "rank1", seed, theirs[seed])
    argv = ["rank1-eig", "--over", "lam", "--against", "rank1", "--together", "4"]
    report.main([*argv, "--to", "direct"])
    line = pd.read_csv("direct.csv").iloc[0]  # of AFID
    test = scipy.stats.ttest_rel(ours, theirs)
    numbers = {
        "difference": -0.5,
        "share": -0.5 / np.mean(theirs) * 100,
        "low": test.confidence_interval(0.95).low,
        "high_together": test.confidence_interval(1 - 0.05 / 4).high,
    }
    for name, exact in numbers.items():
        assert line[name] == pytest.approx(exact)


def test_the_rise_from_best_is_from_the_lowest_fid_after_any_task_that_had_learned_it():
    fid = [[9.0, None, None], [4.0, 8.0, None], [7.0, 6.0, 5.0]]
    hand_made_run("runs/gd", dataset="photos", fid=fid, fid_real=[1.0, 1.0, 1.0])
    (rise,) = reported("rise from best")["mean"]
    assert float(rise) == ((7 - 4) + (6 - 8)) / 2


def test_drift_is_told_along_unit_vectors():
    fisher = [
        {"mu_norm": 2.0, "c_star": 1.0, "energy": 1.0},
        {"mu_norm": 0.5, "c_star": 1.0, "energy": 1.0},
    ]
    hand_made_run("runs/4", "rank4", fisher=fisher, drift=[[9.0], [4.0, -4.0, 1.0, 1.0]])
    hand_made_run("runs/1", "rank1", fisher=fisher, drift=[[9.0], [4.0, -1.0]])
    assert reported()["drift"].to_dict() == {"rank1": "2", "rank4": "2"}


def test_a_model_generates_images_of_the_true_classes_that_are_asked_for(tiny, spy, assert_refused):
    result = tiny("--class-order=random", "--method=finetune")
    labels = spy(r, "ddim_sample", lambda images, model, noise, y, *_: y.tolist())
    report.main(["--sample", "run", "--classes=3,7", "--to=images.png"])
    assert Path("images.png").exists()
    assert [result["class_order"][label] for label in labels[0]] == [3] * 10 + [7] * 10
    assert_refused("--classes 10 0 to 9", report.main, ["--sample", "run", "--classes=3,10"])


# ---- The texts and their programs
ROOT = SCRIPT.parent
PAGES = ROOT / "results/pages"
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("results/**/*.md")]
PROGRAMS = re.findall("```python\n(.*?)```", text_of(PAGES / "your-own.md"), re.DOTALL)


def write_photos():
    """Four images of each of four classes, to train and to test; each class's first in colour."""
    for split, name, i in itertools.product(("train", "test"), "abcd", range(4)):
        path = Path("photos", split, name, f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((50, 40), 50).convert("L" if i else "RGB").save(path)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(PROGRAMS)))
def test_the_programs_for_your_own_training_and_images_run_as_they_stand(k):
    write_photos()
    if "diffusers" in PROGRAMS[k]:
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    before = PROGRAMS[:k] if "rank1_fisher(model" in PROGRAMS[k] else []  # it uses their names
    python("-c", "".join([*before, PROGRAMS[k]]))


@pytest.mark.slow
def test_the_loader_of_folders_refuses_other_classes_and_images_that_it_would_flatten():
    write_photos()
    image = Path("photos/test/a/0.png")
    Image.new("RGBA", (50, 40)).save(image)
    assert f"{image} has mode RGBA" in python("-c", PROGRAMS[-1], check=False).stderr
    image.unlink()
    Path("photos/train/d").rename("photos/train/D")
    refused = python("-c", PROGRAMS[-1], check=False)
    assert refused.returncode == 2
    assert "['D', 'a', 'b', 'c'] to train" in refused.stderr


def test_the_tables_in_the_texts_are_as_their_files_now_are():
    included = re.compile("<!-- include: (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)
    for page in TEXTS:
        for name, table in included.findall(text_of(page)):
            assert table == text_of(ROOT / name), page


def test_the_exercises_table_has_the_numbers_of_its_runs_and_its_changes_of_the_script_apply():
    text = text_of(PAGES / "exercises.md")
    rows = re.findall(r"^\| .* \| `(.*)` \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 14
    for run, *numbers in rows:
        result = r.read_result(PAGES.with_name("runs") / run / "result.json")
        learned = np.diag(np.array(result["fid"], float)).mean()
        exact = (result["afid"][-1], result["forgetting"], learned)
        assert numbers == [f"{value:.1f}" for value in exact]
    studies = text_of(PAGES.with_name("studies.mk"))
    for change in re.findall("^[a-z-]+ = (s[/|].*)$", studies, re.MULTILINE):
        changed = subprocess.check_output(["sed", change, SCRIPT], text=True)
        assert changed != text_of(SCRIPT)
        compile(changed, "changed", "exec")


def test_the_readmes_numbers_are_those_of_its_runs_and_tables():
    text = " ".join(text_of(ROOT / "README.md").split())
    demo = r.read_result(ROOT / "results/runs/demo/result.json")
    assert f"AFID {demo['afid'][-1]:.2f} forgetting {demo['forgetting']:.2f}" in text
    gd = r.read_result(ROOT / "results/runs/exercises/gd+seed=0/result.json")
    assert f"GD alone has {gd['afid'][-1]:.1f} here" in text
    for name in ("long-chain/long-test", "falling/ten-seeds"):
        table = pd.read_csv(PAGES / f"{name}.csv")
        (line,) = table.query("line == 'rank1' and measure == 'AFID'").itertuples()
        shares = [f"{-share:.1f}" for share in (line.share, line.share_high, line.share_low)]
        share, low, high = [number.replace("-", "−") for number in shares]
        assert re.search(rf"{share}%\S* \((95% interval )?{low} to {high}\)", text), name


def test_the_readmes_map_names_functions_that_are_there():
    text = text_of(ROOT / "README.md")
    (section,) = re.findall("## From the paper to the code(.*?)\n## ", text, re.DOTALL)
    names = re.findall("`([a-z_A-Z0-9]+)`", section)
    assert len(names) > 10
    for name in names:
        assert hasattr(r, name)


def test_every_link_and_picture_of_the_texts_leads_somewhere():
    for page in TEXTS:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(page), flags=re.DOTALL)
        for link in re.findall(r'(?:\]\(|src=")([^)\s":]+)[)\s"]', prose):
            to = link.partition("#")[0]
            assert (page.parent / to).exists(), (page, link)


@pytest.mark.slow
def test_bench_does_the_same_work_both_ways_in_parts_and_in_whole_runs():
    lines = bench.main(["--small", "--to", "new"])
    assert len(lines) >= 9
    (table,) = Path("new").glob("bench-*.md")
    for name, line in lines.items():
        assert line["difference"] <= (line["same to"] or 0.05), name  # 0.05: in bfloat16, on a GPU
        assert f"| {name} " in table.read_text()
