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
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cleanfid.features
import cleanfid.fid
import filelock
import numpy as np
import pytest
import scipy.stats
import torch
import torchvision
from PIL import Image
from torch.nn import functional

import rank1_ewc as r
from results import bench, beyond, geometry, report

SCRIPT, CPU, FISHERS = Path(r.__file__), torch.device("cpu"), [r.rank1_fisher, r.diagonal_fisher]
# Of 8 channels the UNet's norms would leave nothing of the time and the class: groups of one channel.
QUICK = ["--channels=16", "--epochs=1", "--sample-steps=2", "--replay-per-class=3", "--fisher-samples=200"]
TINY = ["--channels=16", "--epochs=1", "--batch-size=4", "--sample-steps=1", "--replay-per-class=2"]
TINY += ["--fisher-samples=10"]
CIFAR = torchvision.datasets.CIFAR10.base_folder
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
torch.set_num_threads(1)  # these networks are too small to share out, and a busy machine makes it very slow


@pytest.fixture(autouse=True)
def own_places(monkeypatch, tmp_path_factory):
    """Away from the network and from the user's runs and cache; the digits' classifier is trained once for all."""
    torch.manual_seed(0)
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=urllib.error.URLError("no network")))
    monkeypatch.setattr(r, "QUIET", True)
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


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


def small_unet(seed=0, channels=(16, 16, 16), **settings):
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
    on_cpu = {"device": "cpu", "bf16": False, "cuda_graph": False}
    return r.Settings(**vars(r.parse_args(QUICK)) | on_cpu | changed)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_close_to_its_largest(ours, exact, error):
    """No entry is off by more than this share of the largest."""
    torch.testing.assert_close(ours.double(), exact.double(), atol=error * float(exact.abs().max()), rtol=0)


def assert_refused(capsys, words, *argv, main=r.main):
    """A command line is refused with status 2 and one line on stderr, in which are all these words."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, argv)])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert [word for word in words.split() if word not in error] == [], error


# ---- Part I: diffusion
def test_add_noise_has_the_mean_and_variance_of_the_forward_process():
    x0, eps = torch.full((1, 1, 400, 400), 0.7), torch.randn(1, 1, 400, 400, generator=generator())
    for t in (0, 300, 999):
        abar = math.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
        x_t = r.add_noise(x0, torch.tensor([t]), eps)
        assert x_t.mean().item() == pytest.approx(math.sqrt(abar) * 0.7, abs=0.01)
        assert x_t.var().item() == pytest.approx(1 - abar, rel=0.02, abs=1e-6)


def test_noise_is_not_added_to_uint8():
    images, _ = small_images()
    with pytest.raises(ValueError, match="torch.uint8: to_float"):
        r.per_sample_loss(Denoiser(), images, *r.draw_noise(images, generator()), torch.zeros(6).long())


def test_timesteps_are_drawn_from_all_1000_and_noise_from_a_normal_distribution():
    t, eps = r.draw_noise(torch.zeros(20_000, 1, 2, 2), generator())
    assert t.unique().equal(torch.arange(1000))
    assert (eps.mean().item(), eps.std().item()) == pytest.approx((0, 1), abs=0.02)


def gaussian_denoiser(mean, std):
    """E[eps | x_t, y], in closed form, where every pixel of x_0 is N(mean[y], std^2)."""

    def predict(x, t, y):
        abar, mean_y = (v[:, None, None, None] for v in (r.alphas_cumprod(CPU)[t], torch.tensor(mean)[y]))
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean_y) / (abar * std**2 + 1 - abar)

    return predict


def test_ddim_turns_noise_into_the_gaussian_whose_optimal_denoiser_it_is_given():
    # The probability-flow ODE maps x_999 linearly onto N(mean, std^2); 1000 steps follow it closely.
    mean, std, abar = 0.1, 0.2, r.alphas_cumprod(CPU)[999].item()
    noise, y = torch.randn(2000, 1, 2, 2, generator=generator()), torch.zeros(2000, dtype=torch.long)
    exact = mean + std * (noise - math.sqrt(abar) * mean) / math.sqrt(abar * std**2 + 1 - abar)
    x0 = r.ddim_sample(gaussian_denoiser([mean], std), noise, y, 1000)
    torch.testing.assert_close(x0, exact, atol=0.02, rtol=0)


def test_ddim_and_diffusers_scheduler_generate_the_same_images():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model, scheduler = small_unet().eval(), diffusers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(50)
    x, y = torch.randn(4, 1, 8, 8, generator=generator()), torch.arange(4)
    ours = r.ddim_sample(model, x, y, 50)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(4), y), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-3, rtol=0)


def test_rows_without_a_half_to_replay_and_predictions_that_would_broadcast_are_refused():
    x0, t, eps, y = batch = small_batch()
    model, wide, colours = Denoiser(), lambda x, t, y: x.expand(-1, 2, -1, -1), x0.expand(-1, 3, -1, -1)
    calls = [(r.losses, model, model, *small_batch(5)), (r.losses, wide, None, *batch)]
    calls += [(r.losses, model, wide, *batch), (r.ddim_sample, wide, eps, y, 2)]
    calls += [(r.per_sample_loss, wide, *batch)]
    calls += [(r.per_sample_loss, lambda x, t, y: x[:, :1], colours, t, colours, y)]
    for function, *arguments in calls:
        with pytest.raises(ValueError, match="must give eps like x_t|half of the rows must be real"):
            function(*arguments)


def test_a_model_that_works_in_place_does_not_change_its_input():
    x0, t, _, y = small_batch()
    before = x0.clone()
    assert r.predict_noise(lambda x, t, y: x.mul_(2), x0, t, y).equal(2 * before) and x0.equal(before)


# ---- Part I: generative distillation
def test_replay_pool_holds_equally_many_of_every_old_class_always_from_the_same_noise(monkeypatch):
    starts, steps, teacher = [], [], torch.nn.Linear(1, 1)
    teacher.forward = gaussian_denoiser([-0.5, -0.3, -0.1, 0.1], std=0)  # an image as grey as its class says:
    grey = torch.tensor([64, 89, 115, 140])  # 127.5 (mean + 1)
    spy(monkeypatch, r, "ddim_sample", lambda x0, model, noise, y, n: starts.append(noise) or steps.append(n))
    for num_old in (2, 4):
        x, y = r.replay_pool(settings(replay_per_class=70, replay_steps=num_old), teacher, (1, 8, 8), num_old)
        assert (x.dtype, x.shape) == (torch.uint8, (70 * num_old, 1, 8, 8))
        assert y.equal(torch.arange(num_old).repeat_interleave(70))  # class after class
        assert (x.float() - grey[y][:, None, None, None]).abs().max() <= 1
    noise = torch.cat(starts).view(2 + 4, 70, 1, 8, 8)  # the n-th image's, whatever the class and the task
    assert all(noise[k].equal(noise[0]) for k in range(6)) and len(noise[0].unique(dim=0)) == 70
    assert {*steps} == {2, 4}


def test_one_student_pass_denoises_real_rows_and_imitates_a_teacher_on_all_replayed_ones(monkeypatch):
    student, teacher, calls = small_unet().eval(), small_unet(seed=1).eval(), []
    x0, t, eps, y = small_batch()
    x_t = r.add_noise(x0, t, eps)
    ours, theirs = (torch.cat([m(x_t[[i]], t[[i]], y[[i]]) for i in range(6)]) for m in (student, teacher))
    exact = ((ours[:3] - eps[:3]) ** 2).mean(), ((ours[3:] - theirs[3:].detach()) ** 2).mean()
    spy(monkeypatch, r.UNet, "forward", lambda out, model, *inputs: calls.append((model, len(inputs[0]))))
    found = r.losses(student, teacher, x0, t, eps, y)
    assert calls == [(student, 6), (teacher, 3)]
    for values in zip(found, exact):
        torch.testing.assert_close(*values)
        gradients = [r.flat(torch.autograd.grad(v, student.parameters(), retain_graph=True)) for v in values]
        assert_close_to_its_largest(*gradients, 1e-3)
    without_teacher = r.losses(student, None, x0, t, eps, y)  # all rows are real
    torch.testing.assert_close(without_teacher, (((ours - eps) ** 2).mean(), torch.tensor(0.0)))


# ---- Part I: the Fisher
def papers_loss(model, x0, t, eps, y):
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t][:, None, None, None]
    return ((model(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, y) - eps) ** 2).mean((1, 2, 3))


def gradients_one_by_one(model, batches, loss=papers_loss):
    """g_i (n, D) of the trainable weights in float64, a backward pass per sample."""
    theta = [p for p in model.parameters() if p.requires_grad]
    losses = (loss(model, *(v[None] for v in sample)).sum() for batch in batches for sample in zip(*batch))
    gradients = (torch.autograd.grad(l, theta, materialize_grads=True) for l in losses)
    return torch.stack([r.flat(g) for g in gradients]).double()


def gradients_of_both_passes(model, x, y, n, **loss):
    """g_i of the draws for mu, and of as many fresh ones for c*, of generator(3)."""
    draws = generator(3)
    return [gradients_one_by_one(model, [*r.fisher_batches(x, y, n, draws)], **loss) for _ in range(2)]


def assert_fishers_are_right(model, x, y, n, diagonal=True, **loss):
    """They are those of single samples, in eval mode, c* over fresh draws; and the model's weights are kept."""
    for module in model.modules():
        module.training = False  # without eval(), which may do more
    g, fresh = gradients_of_both_passes(model, x, y, n, **loss)
    exact, before = g.mean(0), copy.deepcopy(model.train().state_dict())
    exact_c_star = float((fresh @ exact).square().mean() / exact.norm() ** 4)
    mu, c_star = r.rank1_fisher(model, x, y, n, generator(3), **loss)
    assert_close_to_its_largest(mu, exact, 1e-3)
    assert float(c_star) == pytest.approx(exact_c_star, rel=1e-3)
    if diagonal:
        found = r.diagonal_fisher(model, x, y, n, generator(3), **loss)
        assert_close_to_its_largest(found, g.square().mean(0), 1e-3)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("n", [10, 40, 4000])
def test_fisher_samples_take_every_image_equally_often_with_its_label_at_random_timesteps(n):
    images, labels = small_images(40)[0], torch.arange(40)  # a label of its own for each
    x0, t, eps, y = (torch.cat(v) for v in zip(*r.fisher_batches(images, labels, n, generator())))
    assert x0.equal(r.to_float(images)[y]) and not y.equal(y.sort().values)
    assert {*y.bincount(minlength=40).tolist()} == ({n // 40} if n >= 40 else {0, 1})
    assert t.min() < 1000 / n**0.5 < 1000 - 1000 / n**0.5 < t.max()
    assert eps.mean().abs() < 0.1


@pytest.mark.parametrize("n", [6, 10, 130])  # each image once, some twice, and more than one batch
def test_the_fishers_match_per_sample_gradients_c_star_over_fresh_draws(n):
    assert_fishers_are_right(small_unet(channels=(8, 8, 8), dropout=0.5), *small_images(), n)


class MergingLoRA(torch.nn.Linear):
    """As loralib has it: eval() adds the low-rank weights to the frozen ones, and train() takes them off."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight.requires_grad_(False)
        self.a, self.b = (torch.nn.Parameter(torch.randn(2, n) / 9) for n in sizes)
        self.apart = 1  # 0: merged

    def train(self, mode=True):
        self.weight.data += (self.apart - mode) * self.b.T @ self.a
        self.apart = int(mode)
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + self.apart * (x @ self.a.T @ self.b)


class Denoiser(torch.nn.Module):
    """A network as a researcher may have it; `kind` says what is special about it."""

    def __init__(self, kind=""):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.kept = kind, ["before"]
        self.classes = torch.nn.Embedding(10, 16, sparse=kind == "sparse embedding")
        self.net = MergingLoRA(81, 64) if kind == "merging LoRA" else torch.nn.Linear(81, 64)
        self.again = self.net if kind == "one module twice" else None
        if kind == "weight norm":
            self.net = torch.nn.utils.parametrizations.weight_norm(self.net)
        self.norm = torch.nn.BatchNorm1d(64, track_running_stats=kind != "batch norm over the batch")
        self.lstm = torch.nn.LSTM(8, 8, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, y):
        inputs = torch.cat([x.flatten(1), self.classes(y), t[:, None] / 1000], 1)
        h = torch.tanh(self.net(inputs))
        if self.kind == "keeps features":
            self.features, self.mean = h, h.mean().detach()
            self.kept.append(h)
        if self.kind == "counts its calls":
            self.calls += 1
        layers = {"batch norm": self.norm, "batch norm over the batch": self.norm}
        layers |= {"self-conditioning": lambda h: h * torch.no_grad()(self.net.forward)(inputs)}
        layers |= {"LSTM": lambda h: self.lstm(h.view(-1, 8, 8))[0]}
        layers |= {"attention": lambda h: self.attention(*3 * [h.view(-1, 8, 8)])[0]}
        layers |= {"mixes samples": lambda h: h - h.mean(0), "random": lambda h: h * torch.rand_like(h)}
        layers |= {"its own backward": lambda h: h.register_hook(lambda g: 2 * g.detach()) and h}
        return layers.get(self.kind, torch.nn.Identity())(h).reshape(-1, 1, 8, 8)


KINDS = ["", "self-conditioning", "sparse embedding", "weight norm", "batch norm", "LSTM", "attention"]
KINDS += ["one module twice", "merging LoRA", "counts its calls"]
NOT_BATCHED = "sparse embedding", "counts its calls"  # the gradients of single samples cannot be
WRONG_KINDS = {"batch norm over the batch": "cannot be taken: .* 1 value per channel"}
WRONG_KINDS |= {"mixes samples": "mixes samples", "random": "draws at random"}
WRONG_KINDS |= {"its own backward": "cannot be taken"}


@pytest.mark.parametrize("kind", [*KINDS, "diffusers"])
def test_the_fishers_are_those_of_single_backward_passes_for_networks_as_researchers_have_them(kind):
    model = ours_and_diffusers((16, 32), 1)[1] if kind == "diffusers" else Denoiser(kind)
    assert_fishers_are_right(model, *small_images(20), 20, diagonal=kind not in NOT_BATCHED)


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_a_network_for_which_c_star_would_be_wrong_is_refused(kind):
    with pytest.raises(ValueError, match=WRONG_KINDS[kind]):
        r.rank1_fisher(Denoiser(kind), *small_images(20), 20, generator())


def test_the_fishers_take_any_loss_of_single_samples_whatever_its_scale_and_floats_as_they_are():
    features, (images, y) = torch.randn(12, 5, generator=generator()), small_images(12)
    classifier = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 10))
    of_class = lambda model, x0, t, eps, y: functional.cross_entropy(model(x0), y % 3, reduction="none")
    twice = lambda model, x, t, _, y: (model(x, t, y) - model(x, t, y).detach() / 2).square().sum((1, 2, 3))
    part = lambda model, x, *_: model.norm(model.net.weight[:, 0] * x.sum((1, 2, 3))[:, None]).square().sum(1)
    assert_fishers_are_right(classifier, features, y, 12, loss=of_class)
    tiny, huge = (lambda *sample, scale=scale: scale * papers_loss(*sample) for scale in (1e-11, 1e10))
    for loss in (twice, part, tiny, huge):
        assert_fishers_are_right(Denoiser(), images, y, 12, loss=loss)


def test_sums_over_a_bfloat16_model_are_in_float32_and_its_penalty_can_be_computed():
    model, images = torch.nn.Linear(5, 1).bfloat16(), torch.randn(40, 5, generator=generator())
    loss = lambda model, x0, t, eps, y: model(x0.bfloat16()).square().flatten()
    mu, c_star = r.rank1_fisher(model, images, torch.arange(40), 40, generator(), loss=loss)
    diagonal = r.diagonal_fisher(model, images, torch.arange(40), 40, generator(), loss=loss)
    assert {v.dtype for v in (mu, c_star, diagonal)} == {torch.float32}
    assert penalty_of(r.Rank1Penalty, [(mu, c_star)], [model])(model) == 0
    assert penalty_of(r.DiagonalPenalty, [diagonal], [model])(model) == 0


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_fisher_leaves_the_model_as_it_was(fisher):
    model = Denoiser("keeps features").train()
    model.net.eval()
    handle, buffers = model.register_forward_hook(lambda *_: None), [*model.buffers()]
    before = copy.deepcopy(model.state_dict())
    fisher(model, *small_images(), 6, generator())
    assert (model.training, model.net.training, model.norm.training) == (True, False, True)
    assert all(a is b for a, b in zip(model.buffers(), buffers))
    assert model.kept == ["before"] and not hasattr(model, "features")
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    handle.remove()
    assert not model._forward_hooks


@pytest.mark.parametrize("fisher", FISHERS)
def test_images_have_one_conversion_and_what_it_does_not_take_is_refused(fisher):
    images, y = small_images(20)
    floats, take = r.to_float(images), lambda x: fisher(Denoiser(), x, y, 20, generator(3))
    torch.testing.assert_close(take(images), take(floats))
    assert r.to_uint8(floats).equal(images)
    for wrong in (images.long(), images.float(), images / 255, images.float() / 100, floats * math.nan):
        for call in (take, r.to_float):  # to_float is training's
            with pytest.raises(ValueError, match="must be uint8 in 0..255, or floats in -1..1"):
                call(wrong)


@pytest.mark.parametrize("fisher", FISHERS)
def test_what_no_fisher_can_be_taken_of_is_refused_and_the_reason_said(fisher):
    (x, y), frozen, broken = small_images(), Denoiser().requires_grad_(False), Denoiser()
    broken.classes.weight.data[4] = math.nan
    turns, of = itertools.count(), r.per_sample_loss
    mean, zero, later = lambda *v: of(*v).mean(), lambda *v: 0 * of(*v), lambda *v: of(*v) / (next(turns) < 1)
    cases = [(frozen, x, 6, of, "all are frozen"), (broken, x, 6, of, "not finite")]
    cases += [(Denoiser(), images, n, of, "cannot take") for images, n in ((x, 0), (x[:0], 6), (x[:2], 6))]
    cases += [(Denoiser(), x, 6, mean, "a number for each sample")]
    if fisher is r.rank1_fisher:  # whose c* would be 0 / 0, or comes from a second pass
        cases += [(Denoiser(), x, 6, zero, "is 0.0: no gradient"), (Denoiser(), x, 6, later, "not finite")]
    for model, images, n, loss, words in cases:
        with pytest.raises((ValueError, FloatingPointError), match=words):
            fisher(model, images, y, n, generator(), loss)


def test_a_fisher_computes_alone_unless_it_is_told_to_share(monkeypatch):
    model, images, reduced, shares = Denoiser(), small_images(130), [], []  # two batches
    alone = [fisher(model, *images, 130, generator()) for fisher in FISHERS]
    monkeypatch.setattr(r, "world", lambda: 2)  # as under torchrun, but nothing comes from the other process
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda v: reduced.append(v.shape))
    for process in (0, 1):
        monkeypatch.setattr(r, "rank", lambda process=process: process)
        torch.testing.assert_close([fisher(model, *images, 130, generator()) for fisher in FISHERS], alone)
        assert len(reduced) == process
        shares.append(r.diagonal_fisher(model, *images, 130, generator(), shared=True))
    torch.testing.assert_close(sum(shares), alone[1])
    r.rank1_fisher(model, *images, 130, generator(), shared=True)
    assert reduced[2:] == [alone[1].shape, ()]


def test_proposition_2_and_theorem_1_gradients_of_a_scaled_identity_are_on_a_line_and_f_is_c_star_mu_mu():
    # eps_hat = (a^T b) x_t, as Proposition 1 has the best denoiser become: linear in x_t, not in theta.
    model = torch.nn.Linear(2, 20, bias=False)  # its weight holds a and b
    model.forward = lambda x, t, y: (model.weight[:, 0] @ model.weight[:, 1]) * x
    mu, c_star = r.rank1_fisher(model, *small_images(), 12, generator(3))
    _, g = gradients_of_both_passes(model, *small_images(), 12)
    lengths = g.norm(dim=1)
    assert_close_to_its_largest((g @ g.T).abs(), torch.outer(lengths, lengths), 1e-6)
    assert lengths.std() > 0.01 * lengths.mean()  # they differ in length: c(x_t)
    assert_close_to_its_largest(c_star * torch.outer(mu, mu), g.T @ g / 12, 1e-4)


# ---- Part I: penalties, against the paper's formulas with every theta*_k kept
def three_tasks():
    """Of each penalty: what add() takes of three tasks; theta* of each; weights on the way through a fourth."""
    rows, c = torch.randn(10, 50, generator=generator(1)), 1.5 + torch.arange(6.0).view(3, 2)
    v, H, stars = 0.3 * rows[:6].view(3, 2, 50), rows[:3].square(), rows[6:9]
    H[:, :5] = 0  # weights that no task cares for
    fishers = {r.Rank1Penalty: [*zip(v[:, 0], c[:, 0])], beyond.RankKPenalty: [*zip(v, c)]}
    fishers[r.DiagonalPenalty] = [*H]
    return [(kind, of_tasks, stars, stars[-1] + 0.1 * rows[-1]) for kind, of_tasks in fishers.items()]


def penalty_of(kind, fishers, stars, lam=7.0):
    penalty = kind(lam)
    for fisher, theta_star in zip(fishers, stars):
        penalty.add(fisher, theta_star)
    return penalty


def value_and_gradient(penalty, theta):
    theta = theta.clone().requires_grad_()
    value = penalty(theta)
    return value.detach().double(), torch.autograd.grad(value, theta)[0].double()


@pytest.mark.parametrize("case", range(3))
def test_a_penalty_its_gradient_and_its_drift_equal_the_formula_with_stored_weights(case):
    kind, fishers, stars, theta = three_tasks()[case]
    pairs = [(torch.eye(50), H) for H in fishers] if kind is r.DiagonalPenalty else fishers

    def along(theta):  # v_kj^T (theta - theta*_k): task k, direction j
        return torch.stack([v.double().view(-1, 50) @ (theta - star) for (v, _), star in zip(pairs, stars)])

    c = torch.stack([c.double().view(-1) for _, c in pairs])
    formula = lambda theta: 7 / 2 * (c * along(theta).square()).sum()
    penalty, exact = penalty_of(kind, fishers, stars), value_and_gradient(formula, theta.double())
    torch.testing.assert_close(value_and_gradient(penalty, theta), exact, rtol=1e-4, atol=1e-5)
    diagonal = kind is r.DiagonalPenalty  # its drift is one number
    drift = math.sqrt(2 / 7 * exact[0]) if diagonal else along(theta.double()).flatten().numpy()
    assert penalty.drift(theta).numpy() == pytest.approx(drift, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty(theta).item() == pytest.approx(float(exact[0]), rel=1e-4)


def test_a_penalty_is_0_before_its_first_task_and_keeps_one_copy_of_the_weights_for_any_number_of_tasks():
    kept = [3 * (50 + 2) + 50, 6 * (50 + 2) + 50, 2 * 50]
    for (kind, fishers, stars, theta), numbers in zip(three_tasks(), kept):
        assert kind(7.0)(theta).tolist() == 0
        held = vars(penalty_of(kind, fishers, stars)).values()
        assert sum(v.numel() for v in held if torch.is_tensor(v)) == numbers


def test_what_a_penalty_stores_is_its_own_whatever_happens_to_the_arguments():
    for kind, fishers, stars, theta in three_tasks():
        exact, penalty = value_and_gradient(penalty_of(kind, fishers, stars), theta), kind(7.0)
        for fisher, theta_star in zip(copy.deepcopy(fishers), stars.clone()):
            weights = theta_star.clone().requires_grad_()  # as flat(model.parameters()) without a detach()
            penalty.add(fisher, weights)
            for v in (*(fisher if isinstance(fisher, tuple) else [fisher]), weights.data):
                v.zero_()
        torch.testing.assert_close(value_and_gradient(penalty, theta), exact)


def test_what_add_returns_for_result_json_is_c_star_and_the_length_of_mu_or_the_trace():
    mu, theta = torch.tensor([3.0, 4.0]), torch.zeros(2)
    told = r.Rank1Penalty(1.0).add((mu, torch.tensor(2.0)), theta)
    assert told == pytest.approx({"c_star": 2, "mu_norm": 5, "energy": 2 * 25})
    assert r.DiagonalPenalty(1.0).add(mu, theta) == {"trace": 7}


def test_a_penalty_comes_back_from_its_saved_state_and_not_into_another_kind(tmp_path):
    for kind, fishers, stars, theta in three_tasks():
        penalty, again = penalty_of(kind, fishers, stars), kind(0.0)
        torch.save(penalty.state_dict(), tmp_path / "penalty.pt")
        state = torch.load(tmp_path / "penalty.pt", weights_only=True)
        again.load_state_dict(state)
        state.get("mu", state.get("H")).zero_()
        torch.testing.assert_close(value_and_gradient(again, theta), value_and_gradient(penalty, theta))
        other = r.Rank1Penalty if kind is r.DiagonalPenalty else r.DiagonalPenalty
        with pytest.raises(ValueError, match=f"not the state of a {other.__name__}"):
            other(0.0).load_state_dict(state)


def test_a_penalty_takes_the_model_or_the_vector_of_its_weights():
    model, moved = Denoiser("merging LoRA"), Denoiser("merging LoRA")  # the trainable ones
    moved.net.a.data.add_(0.1)
    mu = torch.randn(weights_of(model).shape, generator=generator())
    either = lambda model: (model, r.flat(p for p in model.parameters() if p.requires_grad))
    for kind, fisher in ((r.Rank1Penalty, (mu, torch.tensor(2.0))), (r.DiagonalPenalty, mu**2)):
        found = []
        for first, second in itertools.product(either(model), either(moved)):
            penalty = penalty_of(kind, [fisher], [first])
            value = penalty(second)
            found.append((value, penalty.drift(second), *torch.autograd.grad(value, moved.net.a)))
        assert found[0][0] > 0
        torch.testing.assert_close(found[1:], 3 * found[:1])


def test_weights_that_changed_since_the_last_task_and_fishers_of_others_are_refused():
    model, grown = Denoiser(), Denoiser()
    grown.classes = torch.nn.Embedding(12, 16)
    ours, others = weights_of(model), weights_of(grown)
    penalty, new = penalty_of(r.Rank1Penalty, [(ours, 1.0)], [model]), r.DiagonalPenalty(1.0)
    assert penalty(torch.compile(model)) == 0  # whose weights have other names
    by_name = r"classes.weight was \[10, 16\], is \[12, 16\]"
    cases = [(penalty, (grown,), by_name), (penalty.drift, (grown,), by_name)]
    cases += [(penalty.add, ((others, 1.0), grown), by_name), (penalty, (others,), "the penalty holds")]
    cases += [(new.add, (others, model), "trainable"), (new.add, (ours * math.nan, model), "not finite")]
    cases += [(penalty.add, ((ours, c_star), model), "from 0 on") for c_star in (-1.0, math.inf, math.nan)]
    for call, arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            call(*arguments)


def test_rank1_penalty_is_exact_at_the_papers_size_in_float32():
    drawn = (0.05 * torch.randn(37_191_681, generator=generator(seed)) for seed in range(3))
    theta_star, theta_start, noise = drawn
    mu = 2e-4 * noise.roll(1)
    theta = theta_start + 2e-4 * noise + 3e-4 * mu
    from_start, from_first = (float(mu.double() @ (theta.double() - v)) for v in (theta_start, theta_star))
    fishers = 2 * [(mu, torch.tensor(2.5))]
    both = penalty_of(r.Rank1Penalty, fishers, [theta_star, theta_start])
    assert both(theta).item() == pytest.approx(7 / 2 * 2.5 * (from_start**2 + from_first**2), rel=1e-6)
    # With the last task alone the penalty is tiny: mu^T theta - mu^T theta* in float32 would drown it.
    alone = penalty_of(r.Rank1Penalty, fishers, [theta_start])
    assert alone(theta).item() == pytest.approx(7 / 2 * 2.5 * from_start**2, rel=1e-3)


# ---- Part I: training
@pytest.mark.parametrize("accumulate", [0, 1, 3])  # 0: as Part I has it, without a run
def test_a_training_step_is_one_step_of_adam_on_the_sum_of_the_papers_three_terms(accumulate):
    student, teacher, batch = small_unet().eval(), small_unet(seed=1).eval(), small_batch(12)
    theta, expected = weights_of(student), copy.deepcopy(student)
    fisher = torch.ones_like(theta), torch.tensor(1e-4)  # its gradient is about as large as the losses'
    penalty = penalty_of(r.Rank1Penalty, [fisher], [theta - 1e-4], lam=3.0)
    exact = torch.stack([*r.losses(expected, teacher, *batch), penalty(expected)])
    assert exact.min() > 0
    exact.sum().backward()
    torch.optim.Adam(expected.parameters(), lr=1e-2, eps=1.0).step()

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, eps=1.0)
    computed = [r.gradient_function(settings(accumulate=accumulate))] if accumulate else []
    terms = r.train_step(student, teacher, penalty, optimizer, batch, *computed)
    torch.testing.assert_close(terms, exact.detach(), rtol=1e-4, atol=1e-6)
    moved, right = (weights_of(model) - theta for model in (student, expected))
    assert (moved - right).norm() < 1e-3 * right.norm()  # eps 1: else the first step is the gradient's sign


def epoch_of(*when, replay=True):
    """x0, t, eps and labels of an epoch of 43 images and as many old ones, (4, 20, ..) each; and a draw after it."""
    x, y = small_images(86)[0], torch.arange(86)  # an image's label is its number
    task, old = r.Data(x[:43], y[:43], x[:43], y[:43]), (x[43:], y[43:]) if replay else None
    return *(torch.stack(v) for v in zip(*r.epoch_batches(task, old, 10, *when))), torch.rand(5)


def test_an_epoch_takes_each_image_once_in_random_order_with_as_many_replayed_ones_and_their_own_labels():
    x0, _, _, labels, _ = epoch_of(0, 1, 0)
    real, replayed = labels[:, :10].flatten(), labels[:, 10:].flatten() - 43
    assert x0.equal(r.to_float(small_images(86)[0])[labels])
    assert len(real.unique()) == 40 and not real.equal(real.sort().values)  # four full batches
    assert {*replayed.tolist()} <= {*range(43)} and len(replayed.unique()) > 20


def test_every_draw_of_an_epoch_has_a_generator_of_its_own_seeded_by_seed_task_and_epoch():
    x0, t, eps, labels, dropout = epoch = epoch_of(5, 2, 3)
    order, noise, replay = (r.rng(CPU, 5, purpose, 2, 3) for purpose in ("order", "noise", "replay"))
    assert labels[:, :10].flatten().equal(torch.randperm(43, generator=order)[:40])
    for i in range(4):
        assert labels[i, 10:].equal(43 + torch.randint(43, (10,), generator=replay))
        torch.testing.assert_close((t[i], eps[i]), r.draw_noise(x0[i], noise), rtol=0, atol=0)
    for other in ((6, 2, 3), (5, 3, 3), (5, 2, 4)):
        assert not any(a.equal(b) for a, b in zip(epoch_of(*other), epoch))
    alone = epoch_of(5, 2, 3, replay=False)
    assert alone[0].equal(x0[:, :10]) and alone[4].equal(dropout)


def test_afid_and_forgetting_equal_a_matrix_worked_by_hand():
    afid, forgetting = r.afid_and_forgetting([[4.0, None, None], [6.0, 10.0, None], [9.0, 12.0, 3.0]])
    assert (afid, forgetting) == ([4, 8, 8], pytest.approx((5 + 2 + 0) / 3))
    assert r.afid_and_forgetting([[4.0, 5.0, 9.0]]) == ([6], None)  # joint training


# ---- Part I: the loop over the tasks, on six images a class
def four_pixels(images):
    return images.flatten(1)[:, :4].double().numpy()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """tiny(flag, ..) runs five tasks of two grey classes, and returns the result and what was seen on the way."""
    y, noise = torch.arange(10).repeat_interleave(6), torch.randint(20, (60, 1, 8, 8), generator=generator())
    x = (24 * y[:, None, None, None] + noise).to(torch.uint8)
    test = torch.arange(60) % 6 < 5  # five of each class, upside down
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: r.Data(x, y, x[test].flip(2), y[test]), ""))
    monkeypatch.setattr(r, "classifier_features", lambda *_: four_pixels)
    names = "learned tasks replays teachers samples fishers weights places rates modes"
    seen = SimpleNamespace(**{name: [] for name in names.split()})

    def after_task(_, cfg, state, task, replay, bar):
        seen.learned.append(weights_of(state.model))
        seen.tasks.append(task)
        seen.replays.append(replay)

    def after_step(terms, model, teacher, penalty, optimizer, *_):
        seen.weights.append(weights_of(model))
        seen.places.append([p.data_ptr() for p in model.parameters()])
        seen.rates.append(optimizer.param_groups[0]["lr"])
        seen.modes.append((model.training, teacher and teacher.training))

    def after_sampling(images, cfg, model, noise, y, name, *_):
        if "task" in name:  # those for the FID
            seen.samples.append((images, noise, y))

    def recorded(fisher, model, *args, **options):
        seen.fishers.append((weights_of(model), args, options))
        return fisher(model, *args, **options)

    spy(monkeypatch, r, "replay_pool", lambda _, cfg, teacher, *rest: seen.teachers.append(teacher))
    spy(monkeypatch, r, "sample_images", after_sampling)
    spy(monkeypatch, r, "train_step", after_step)
    spy(monkeypatch, r, "train_task", after_task)
    for name, row in (r.METHODS | beyond.METHODS).items():
        fisher = row.fisher and functools.partial(recorded, row.fisher)
        monkeypatch.setitem(r.METHODS, name, row._replace(fisher=fisher))
    return lambda *argv, out="run": (r.main([*TINY, "--out", str(tmp_path / out), *argv]), seen)


@pytest.mark.parametrize("method", [*r.METHODS, *beyond.METHODS])
def test_each_methods_row_does_what_its_name_says(tiny, tmp_path, method):
    joint, replays = method == "joint", method not in ("joint", "finetune", "diag-only", "rank1-only")
    distills, penalizes = replays and method != "replay", method.startswith(("diag", "rank", "iso"))
    directions = {"rank2": 2, "rank4": 4}.get(method, 1)
    result, seen = tiny(f"--method={method}")
    learned = [task.y.unique().tolist() for task in seen.tasks]
    replayed = [replay and replay[1].unique().tolist() for replay in seen.replays]
    assert learned == ([[*range(10)]] if joint else [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])
    assert replayed == [[*range(2 * k)] if replays and k > 0 else None for k in range(len(learned))]
    log = read_log(tmp_path / "run")
    assert [line["distill"] > 0 for line in log] == [k > 0 and distills for k in range(len(log))]
    assert [line["ewc"] > 0 for line in log] == [k > 0 and penalizes for k in range(len(log))]
    assert len(result["fisher"]) == len(result["drift"]) == 4 * penalizes
    for k, row in enumerate(result["drift"], 1):  # after tasks 2 to 5, of every old task
        assert len(row) == (directions * k if method.startswith("rank") else 1)
    assert (result["lam"] > 0) == penalizes
    assert [row.count(None) for row in result["fid"]] == ([0] if joint else [4, 3, 2, 1, 0])
    assert joint == (result["forgetting"] is None) == (result["fid_pooled"] is not None)
    assert (result["afid"], result["forgetting"]) == r.afid_and_forgetting(result["fid"])


def test_the_teacher_is_the_last_tasks_finished_model_frozen_in_eval_mode_while_the_student_trains(tiny):
    _, seen = tiny("--dropout=0.1", "--method=gd")
    teachers = [r.flat(teacher.parameters()) for teacher in seen.teachers]
    torch.testing.assert_close(teachers, seen.learned[:4], rtol=0, atol=0)
    assert not any(teacher.requires_grad for teacher in teachers)
    assert seen.modes == 3 * [(True, None)] + 12 * [(True, False)]


def test_with_ema_a_task_ends_with_the_average_of_its_weights(tiny):
    _, seen = tiny("--ema=0.9", "--method=finetune")
    for k in range(1, 5):  # three steps a task
        average = seen.learned[k - 1]
        for weights in seen.weights[3 * k : 3 * k + 3]:
            average = 0.9 * average + 0.1 * weights
        torch.testing.assert_close(seen.learned[k], average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("decay", "expected"), [("linear", [6, 5, 4, 3, 2, 1]), ("none", [6] * 6)])
def test_the_learning_rate_falls_linearly_to_0_within_a_task_or_stays(tiny, decay, expected):
    _, seen = tiny(f"--lr-decay={decay}", "--lr=6e-3", "--epochs=2", "--method=finetune")
    assert seen.rates == pytest.approx([1e-3 * rate for rate in 5 * expected])


@pytest.mark.parametrize("method", ["rank1", "rank1-proximal"])
def test_training_leaves_the_weights_where_a_recorded_step_reads_them_in_memory(tiny, method):
    _, seen = tiny("--ema=0.9", f"--method={method}")
    assert seen.places == 15 * seen.places[:1]


def test_a_fisher_is_taken_of_the_finished_model_on_the_tasks_images_after_each_task_but_the_last(tiny):
    result, seen = tiny()
    assert len(seen.fishers) == len(result["fisher"]) == 4
    for k, (weights, (x, y, n, draws), options) in enumerate(seen.fishers):
        assert weights.equal(seen.learned[k])
        assert x.equal(seen.tasks[k].x) and y.equal(seen.tasks[k].y)
        assert (n, options) == (10, {"shared": True})
        assert draws.initial_seed() == r.rng(CPU, 0, "fisher", k).initial_seed()


@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_a_fid_is_of_test_images_and_of_samples_of_the_same_labels_from_the_same_noise(tiny, method):
    result, seen = tiny(f"--method={method}")
    noises, tasks = {}, r.split_tasks(r.LOADERS["digits"][0](None), 5)
    cells = [(j, k) for j, row in enumerate(result["fid"]) for k in range(5) if row[k] is not None]
    for (j, k), (images, noise, y) in zip(cells, seen.samples, strict=True):
        assert y.equal(tasks[k].test_y) and noise.equal(noises.setdefault(k, noise))
        exact = r.frechet_distance(four_pixels(tasks[k].test_x), four_pixels(images))
        assert result["fid"][j][k] == pytest.approx(exact)
    assert not noises[0].equal(noises[1])
    assert min(result["fid_real"]) > 1  # of training images: of the test images themselves it would be 0
    if method == "joint":  # one more FID, of all classes together
        real, sampled = torch.cat([task.test_x for task in tasks]), torch.cat([v[0] for v in seen.samples])
        exact = r.frechet_distance(four_pixels(real), four_pixels(sampled))
        assert result["fid_pooled"] == pytest.approx(exact)


def test_a_model_that_does_not_move_has_the_same_fid_after_every_task(tiny, monkeypatch):
    monkeypatch.setattr(r, "train_task", lambda *_: None)
    fid = tiny("--dropout=0.5", "--method=finetune")[0]["fid"]
    assert all(fid[j][k] == fid[k][k] for j in range(5) for k in range(j))


def test_rank1_without_a_penalty_is_gd_to_the_last_digit(tiny):
    # lambda 0 is the baseline, and the Fisher's random draws change nobody else's.
    assert tiny("--lam=0", out="a")[0]["fid"] == tiny("--method=gd", out="b")[0]["fid"]


def test_the_progress_bar_counts_the_steps_of_the_whole_run_also_of_one_that_goes_on(tiny, monkeypatch):
    bars = []
    monkeypatch.setattr(r, "QUIET", False)
    spy(monkeypatch, r, "progress", lambda bar, *_: bars.append(bar) if bar.unit == "step" else None)
    interrupted(tiny, "train_step", 8)  # in the third task
    _, seen = tiny()
    assert (bars[-1].n, bars[-1].total) == (15, 15) and len(seen.rates) == 7 + 9


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
    assert found.dtype == torch.bfloat16
    exact = functional.group_norm(x.float(), 2, norm.weight, norm.bias)
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0)


# ---- Part II: the data
def test_digits_are_all_there_about_160_test_images_a_task_and_limit_keeps_the_first_of_each_class():
    data = r.load_data("digits", Path())
    assert len(data.y) + len(data.test_y) == 1797
    assert (data.x.dtype, data.x.min(), data.x.max()) == (torch.uint8, 0, 255)
    assert all(150 <= len(task.test_y) <= 170 for task in r.split_tasks(data, 5))
    few = r.limit_classes(data, 3)
    assert few.y.tolist() == few.test_y.tolist() == [c for c in range(10) for _ in range(3)]
    assert all(few.x[few.y == c].equal(data.x[data.y == c][:3]) for c in range(10))


def test_tasks_hold_every_class_once_in_label_order():
    y = torch.randint(20 * 50, (60000,), generator=generator()).sort().values
    x = torch.stack([y // 256, y % 256], 1).to(torch.uint8).view(-1, 1, 1, 2)  # an image shows its label
    parts = r.split_tasks(r.Data(x, y, x[::3], y[::3]), 20)
    for k, part in enumerate(parts):
        for images, labels in (part[:2], part[2:]):
            assert labels.unique().equal(torch.arange(k * 50, (k + 1) * 50))
            assert (256 * images[:, 0, 0, 0].long() + images[:, 0, 0, 1]).equal(labels)
    assert [sum(map(len, column)) for column in zip(*parts)] == [60000, 60000, 20000, 20000]
    assert parts[0].x.untyped_storage().data_ptr() == parts[1].x.untyped_storage().data_ptr()  # views


def pictures(labels, channels, size=32, test=False):
    """Images (N, channels, size, size) uint8: each number says its label, channel, row, column and split."""
    rows, columns = np.indices((size, size))
    place = 50 * np.arange(channels)[:, None, None] + 3 * rows + 2 * columns
    return (7 * np.asarray(labels)[:, None, None, None] + place + 99 * test).astype(np.uint8)


def write_idx(folder):
    """MNIST's files, 600 and 100 images of 28x28."""
    folder.mkdir(parents=True)
    for split, n in (("train", 600), ("t10k", 100)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = pictures(labels, 1, 28, split == "t10k")[:, 0]
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x800 + content.ndim, *content.shape], ">i4")
            (folder / f"{split}-{name}-ubyte").write_bytes(head.tobytes() + content.tobytes())


def write_cifar10(folder, monkeypatch):
    """CIFAR-10's pickles, 20 images each, their checksums known."""
    folder.mkdir()
    files, labels = {"batches.meta": {"label_names": ["any"] * 10}}, [*range(9, -1, -1)] * 2
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        images = pictures(labels, 3, test=name == "test_batch")
        files[name] = {"data": images.reshape(20, 3072), "labels": labels}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    md5 = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in files]
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5[0][1]}
    for name, value in {"train_list": md5[1:6], "test_list": md5[6:], "meta": meta}.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)


def write_npz(folder):
    """The downsampled ImageNet's files, 44 images each, of classes 1..20."""
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"train_data_batch_{k}.npz" for k in range(1, 11)), "val_data.npz"]):
        labels = np.random.default_rng(i).permutation(44) % 20
        images = pictures(labels, 3, test=name == "val_data.npz")
        np.savez(folder / name, data=images.reshape(44, 3072), labels=labels + 1)


SETS = [("mnist", 1, 10, 600, 100), ("fashion", 1, 10, 600, 100), ("cifar10", 3, 10, 100, 20)]
SETS += [("imagenet32", 3, 20, 440, 44)]


@pytest.mark.parametrize("row", SETS)
def test_a_datasets_files_are_read_as_32x32_pixels_class_after_class(tmp_path, monkeypatch, row):
    name, channels, classes, n, m = row
    write_cifar10(tmp_path / CIFAR, monkeypatch)
    write_npz(tmp_path / "imagenet32")
    for folder in ("MNIST", "FashionMNIST"):
        write_idx(tmp_path / folder / "raw")
    data = r.load_data(name, tmp_path)
    assert (len(data.x), len(data.test_x)) == (n, m)
    for x, y in (data[:2], data[2:]):
        assert y.equal(y.sort().values) and y.unique().equal(torch.arange(classes))
        pad = 2 if channels == 1 else 0
        expected = torch.from_numpy(pictures(y, channels, 32 - 2 * pad, test=x is data.test_x))
        assert x.equal(functional.pad(expected, 4 * (pad,)))


# ---- Part II: the metric
def test_frechet_distance_equals_clean_fids_and_a_case_solved_by_hand():
    a, b = (torch.randn(200, 8, generator=generator(s)).numpy() * (1 + s) + s for s in range(2))
    exact = cleanfid.fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert r.frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)
    # Uncorrelated axes: each adds (difference of means)^2 + (difference of standard deviations)^2.
    a = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # variance 4/3 on both axes
    assert r.frechet_distance(a, 3 * a + 5) == pytest.approx(2 * 5**2 + 2 * (3 - 1) ** 2 * 4 / 3)
    assert r.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_inception_gets_rgb_in_0_to_255_and_resizes_itself(monkeypatch):
    network = Mock(side_effect=lambda batch: batch.mean((2, 3)))  # the mean colour
    build = Mock(return_value=network)
    monkeypatch.setattr(cleanfid.features, "build_feature_extractor", build)
    images = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    colours = np.arange(250)[:, None].repeat(3, 1)
    np.testing.assert_allclose(r.inception_features(CPU)(images), colours, atol=1e-3)
    assert build.call_args.args[0] == "legacy_tensorflow"
    assert {(*call.args[0].shape[1:],) for call in network.call_args_list} == {(3, 8, 8)}


def test_classifier_is_good_trained_once_and_a_damaged_file_of_it_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = r.load_data("digits", tmp_path)
    features = [r.classifier_features("digits", data, CPU)(data.test_x[:20])]
    assert float(re.search(r"right on ([\d.]+)% of its test images", capsys.readouterr().out)[1]) > 95
    (file,) = (tmp_path / "cache/rank1_ewc").iterdir()
    written = file.stat().st_mtime_ns
    features += [r.classifier_features("digits", data, CPU)(data.test_x[:20])]
    assert file.stat().st_mtime_ns == written
    assert features[0].shape == (20, 64) and np.array_equal(*features)
    file.write_bytes(file.read_bytes()[:100])
    assert_refused(capsys, str(file), *QUICK, "--out", tmp_path / "out")


# ---- Part III: importing, settings, files
IMPORTS = """
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


def python(*arguments, check=True, env=None, **options):
    """The finished process, with what it printed, of a Python that finds the script."""
    options = {"cwd": SCRIPT.parent, "env": os.environ | (env or {}), "capture_output": True} | options
    return subprocess.run([sys.executable, *map(str, arguments)], text=True, check=check, **options)


def test_importing_changes_nothing_loads_nothing_heavy_and_needs_no_home_folder(monkeypatch):
    env = {"RANK": "1", "WORLD_SIZE": "x", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "left over"}
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # which importing torchvision sets
    assert python("-c", IMPORTS, env=env).stdout == "set()\n"


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
    assert (cfg.epochs, cfg.replay_per_class, cfg.tasks, cfg.channels[:2]) == (100, 1300, 20, [128, 256])
    cfg = r.parse_args(["--dataset=fashion", "--small", "--limit=50", "--epochs=3"])
    assert (cfg.channels, cfg.epochs, cfg.replay_per_class) == ([16, 32, 32, 32], 3, 50)
    assert (cfg.fisher_samples, str(cfg.out)) == (100, "runs-small/fashion/rank1+seed=0")
    assert r.parse_args(["--small"]).epochs == r.parse_args([]).epochs  # the digits are small
    assert r.parse_args(["--limit=50", "--fisher-samples=7"]).fisher_samples == 7
    assert r.parse_args(["--limit=500"]).replay_per_class == 200  # no more than without it


def test_an_unfinished_file_never_takes_the_place_of_a_whole_one(tmp_path):
    (tmp_path / "file").write_text("old")
    for stops, seen in ((KeyboardInterrupt,) * 2, (RuntimeError, OSError)):  # of a full disk, from torch.save
        with pytest.raises(seen, match="file"), r.whole(tmp_path / "file") as file:
            file.write(b"ne")
            raise stops("file")
        assert contents(tmp_path) == {"file": b"old"}


# ---- Part III: runs that survive
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(flag, ..) is the folder of a whole run on digits with these flags, made once for all tests."""

    @functools.cache
    def of(*argv):
        folder = tmp_path_factory.mktemp("finished")
        r.main([*QUICK, "--out", str(folder), *argv])
        return folder

    return of


@pytest.mark.slow
def test_a_run_from_the_command_line_leaves_its_results(tmp_path):
    done = python(SCRIPT, *QUICK, "--out", tmp_path)
    assert done.stdout.count("digits-classifier") == 6  # the features of the FID, with every one that is told
    assert "task 5/5 rank1" in done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["dataset"], result["method"], result["seed"]) == ("digits", "rank1", 0)
    assert set(result["seconds"]) == {"replay", "train", "fisher", "fid"}
    assert result["script"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    assert [line["task"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    r.UNet(1, 10, (16,), 1).load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    pictures = [f"samples-task{k}.png" for k in range(1, 6)]
    for k, name in enumerate(pictures, 1):
        picture = torchvision.io.decode_image(str(tmp_path / name)).float()
        assert picture.shape[1:] == (2 * k * 34 + 2, 10 * 34 + 2) and picture.std() > 1
    files = {*pictures, "checkpoint.pt", "log.jsonl", "model.pt", "result.json", ".lock"}
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
    ("write_json", 1, "--dropout=0.1", "5 of 5 tasks and 0 epochs"),  # all is done but the result
    ("train_step", 16, "--method=joint", "0 of 5 tasks and 1 epochs"),
    ("train_step", 11, "--method=diag-only", "1 of 5 tasks and 1 epochs"),
    ("train_step", 11, "--method=rank1-proximal --ema=0.9", "1 of 5 tasks and 1 epochs"),
]


@pytest.mark.parametrize(("what", "nth", "argv", "at"), STOPS)
def test_after_ctrl_c_the_same_command_ends_the_run_the_same(tiny, tmp_path, capsys, what, nth, argv, at):
    argv, folders = ["--epochs=2", *argv.split()], [tmp_path / "stopped", tmp_path / "whole"]
    interrupted(tiny, what, nth, *argv, "--fresh", out="stopped")
    assert not (folders[0] / "result.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rank1_ewc: interrupted; the same command, without --fresh, goes on")
    tiny(*argv, out="stopped")
    assert f"{folders[0] / 'checkpoint.pt'}: {at}" in capsys.readouterr().out
    tiny(*argv, out="whole")
    stopped, whole = (r.read_result(folder / "result.json") | {"seconds": None} for folder in folders)
    assert stopped == whole
    assert read_log(folders[0]) == read_log(folders[1])
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in folders]
    torch.testing.assert_close(*models, rtol=0, atol=0)


def test_an_unfinished_run_shows_what_it_has_and_keeps_no_teacher_of_a_finished_task(tiny, tmp_path):
    interrupted(tiny, "train_step", 7, "--ema=0.9")  # at the beginning of the third task
    assert [line["task"] for line in read_log(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run/result.json").exists()
    assert (tmp_path / "run/samples-task2.png").exists()
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert [saved[name] for name in ("task", "teacher", "optimizer", "average")] == [2, None, None, None]


def test_a_finished_run_given_again_prints_its_result_and_does_nothing(tiny, tmp_path, monkeypatch, capsys):
    tiny()
    before = contents(tmp_path / "run")
    monkeypatch.setitem(r.LOADERS, "digits", None)  # not even the data is read
    result, _ = tiny()
    assert f"AFID {result['afid'][-1]:.2f}" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_fresh_starts_over_another_seed_gives_another_result_and_the_old_one_does_not_outlive_it(
    tiny, tmp_path
):
    first, _ = tiny("--seed=1")
    interrupted(tiny, "train_step", 2, "--seed=2", "--fresh")
    second, _ = tiny("--seed=2")
    assert (first["seed"], second["seed"]) == (1, 2) and first["fid"] != second["fid"]
    tiny("--method=joint", "--fresh")
    assert [path.name for path in (tmp_path / "run").glob("samples*")] == ["samples-task5.png"]


@pytest.mark.parametrize("file", ["checkpoint.pt", "result.json"])
def test_a_file_of_other_settings_or_a_damaged_one_is_refused_and_kept(tiny, tmp_path, capsys, file):
    tiny(out="whole")
    whole, path = (tmp_path / "whole" / file).read_bytes(), tmp_path / "run" / file
    path.parent.mkdir()
    cases = [(whole, "--lam=11", "--lam 10.0 11.0"), (whole, "--tasks=2", "--tasks 5 2")]
    cases += [(broken, "--lam=10", "damaged") for broken in (b"", b"{}", whole[: len(whole) // 2])]
    if file == "checkpoint.pt":  # zeros in it, which torch.load does not see
        parts = [len(whole) * share // 12 for share in range(1, 12)]
        cases += [(whole[:i] + bytes(200) + whole[i + 200 :], "--lam=10", "damaged") for i in parts]
    if file == "checkpoint.pt":  # its parts, which do not belong together
        saved = torch.load(path.parents[1] / "whole" / file, weights_only=True)
        for wrong in ({"task": 7}, {"task": -1}, {"fid": saved["fid"][1:]}, {"other": 0}, {"other": Mock}):
            torch.save(saved | wrong, path)
            words = "more than numbers" if Mock in wrong.values() else "belong together"
            cases += [(path.read_bytes(), "--lam=10", f"damaged {words}")]
    if file == "result.json":
        cases += [(whole.replace(b'"afid": [', b'"afid": [NaN, '), "--lam=10", "damaged NaN")]
    retired = whole.replace(b'"lam": 10.0, "fish', b'"form": "other", "lam": 10.0, "fish')
    if file == "result.json":  # of a setting that there was once, at another value than what is done now
        cases += [(retired, "--lam=10", "--form other not loss")]
    for written, flag, words in cases:
        path.write_bytes(written)
        assert_refused(capsys, f"{words} {path} --fresh", *TINY, flag, "--out", path.parent)
        assert path.read_bytes() == written
    if file == "result.json":
        path.write_bytes(retired.replace(b"other", b"loss"))  # as it is done still
        assert r.main([*TINY, "--out", str(path.parent)])["method"] == "rank1"


def test_a_run_goes_on_with_the_same_images_alone_and_its_result_says_which(tiny, tmp_path, capsys):
    interrupted(tiny, "train_step", 7)
    capsys.readouterr()
    load, files = r.LOADERS["digits"]
    other = lambda _: load(_)._replace(test_x=load(_).test_x.flip(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(r.LOADERS, "digits", (other, files))
        assert_refused(capsys, "checkpoint.pt other images --fresh", *TINY, "--out", tmp_path / "run")
    assert tiny()[0]["data"] == r.digest(r.load_data("digits", tmp_path))


def test_a_model_that_is_not_of_a_run_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"the user's own")
    assert_refused(capsys, f"{tmp_path}/model.pt --out", *TINY, "--out", tmp_path)
    assert contents(tmp_path)["model.pt"] == b"the user's own"


def test_weights_and_samples_that_are_not_finite_stop_a_run(tiny, monkeypatch, capsys, tmp_path):
    with pytest.raises(FloatingPointError, match="image is not finite"):
        r.to_uint8(torch.tensor([0.0, math.nan]))
    with pytest.raises(FloatingPointError, match="features of some images"):
        r.frechet_distance(np.full((3, 2), np.nan), np.ones((3, 2)))
    steps = itertools.count(1)

    def last_update_diverges(terms, model, *_):
        if next(steps) == 2:  # the last of the first task: its loss was computed before
            r.trainable(model)[0].data[0] = math.inf

    spy(monkeypatch, r, "train_step", last_update_diverges)
    assert_refused(capsys, "weight not finite task 1 --lr", *TINY, "--batch-size=6", "--out", tmp_path / "x")


def test_a_tilde_in_a_path_is_the_home_folder_if_there_is_one():
    assert r.folder("~/x") == Path.home() / "x" and r.folder("~nobody-here/x") == Path("~nobody-here/x")


def test_a_file_that_cannot_be_read_or_written_is_named_and_not_called_damaged(tiny, tmp_path, capsys):
    def read(_):
        with r.or_stop("result.json is damaged", "remove it"):
            raise PermissionError(13, "Permission denied", "run/result.json")

    with pytest.raises(SystemExit):
        read(None)
    error = capsys.readouterr().err
    assert "run/result.json cannot be read" in error and "damaged" not in error and "remove" not in error
    (tmp_path / "run/log.jsonl").mkdir(parents=True)
    assert_refused(capsys, f"{tmp_path}/run/log.jsonl written", *TINY, "--out", tmp_path / "run")


def test_a_folder_that_another_run_writes_into_is_refused_and_left_alone(tiny, tmp_path, capsys):
    tiny()
    before = contents(tmp_path / "run")
    with filelock.FileLock(tmp_path / "run/.lock"):
        assert_refused(capsys, f"{tmp_path}/run", *TINY, "--fresh", "--out", tmp_path / "run")
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
    assert "interrupted; the same command goes on" in printed.splitlines()[-1]


@pytest.mark.slow
def test_a_closed_stderr_and_a_stdout_that_takes_ascii_alone_end_no_run(tiny, tmp_path):
    tiny()
    show = "import rank1_ewc as r; r.table = lambda _: '\xb1'; r.program()"
    command = shlex.join([sys.executable, "-c", show, *TINY, "--out", f"{tmp_path}/run"])
    command = f"PYTHONIOENCODING=ascii {command} 2>&-"
    done = subprocess.run(command, shell=True, cwd=SCRIPT.parent, check=True, capture_output=True)
    assert done.stdout.startswith(b"?\n")


@needs_cuda
def test_a_run_on_cuda_goes_on_after_an_interrupt(tiny):
    interrupted(tiny, "train_step", 11, "--epochs=2", "--device=cuda")
    assert len(tiny("--epochs=2", "--device=cuda")[0]["fid"]) == 5


RECORDED = [(r.Rank1Penalty, 1), (r.Rank1Penalty, 2), (beyond.ProximalPenalty, 1)]


@needs_cuda
@pytest.mark.parametrize(("penalty", "accumulate"), RECORDED)
def test_recorded_steps_are_the_same_as_others(penalty, accumulate):
    x, y = (v.cuda() for v in small_images(40))
    losses, weights = [], []
    for recorded in (False, True):
        gradient_of = r.gradient_function(settings(device="cuda", accumulate=accumulate, cuda_graph=recorded))
        student, teacher = small_unet(dropout=0.1).cuda(), small_unet(seed=1).cuda().eval()
        theta = weights_of(student)
        held = penalty_of(penalty, [(torch.ones_like(theta), theta.new_tensor(2.0))], [theta - 1e-4], lam=3.0)
        networks = student, teacher, held, torch.optim.Adam(student.parameters(), lr=1e-3)
        batches = r.epoch_batches(r.Data(x, y, x, y), (x, y), 8, 0, 1, 0)
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


def test_bf16_trains_and_samples_in_bfloat16_but_weights_and_fisher_are_float32(tiny, tmp_path, monkeypatch):
    since, seen = set(), {"train_step": set(), "sample_images": set(), "add": set()}
    spy(monkeypatch, r.UNet, "forward", lambda eps, *_: since.add(eps.dtype))
    adds = (r.Rank1Penalty, "add"), (r.DiagonalPenalty, "add")  # each follows a Fisher
    for owner, name in ((r, "train_step"), (r, "sample_images"), *adds):
        spy(monkeypatch, owner, name, lambda *_, name=name: seen[name].update(since) or since.clear())
    for method in ("rank1", "diag"):
        result, _ = tiny("--bf16", f"--method={method}", out=method)
        assert all(math.isfinite(v) for v in result["afid"])
        saved = torch.load(tmp_path / method / "model.pt", weights_only=True)
        assert {v.dtype for v in saved.values()} == {torch.float32}
    half = {torch.bfloat16}
    assert seen == {"train_step": half, "sample_images": half, "add": {torch.float32}}


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
TORCHRUN = ["-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--no-python", sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "status", "error"), [([], -signal.SIGKILL, 0), (TWO, 1, 0.01)])
def test_one_process_goes_on_where_one_or_two_were_killed(tmp_path, finished, launcher, status, error):
    expected = r.read_result(finished("--epochs=2") / "result.json")["afid"]
    argv = [*QUICK, "--epochs=2", "--out", str(tmp_path)]
    assert python(*launcher, "-c", KILLS_ITSELF, *argv, check=False).returncode == status
    assert len(read_log(tmp_path)) == 5  # of seven checkpoints in three tasks, two were at a task's end
    assert r.main(argv)["afid"] == pytest.approx(expected, rel=error)


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "accumulate"), [(1, 2), (2, 1)])
def test_two_processes_on_one_machine_or_on_two_learn_what_one_learns(tmp_path, finished, nodes, accumulate):
    argv = [*QUICK, "--epochs=2", f"--accumulate={accumulate}", "--out", str(tmp_path)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = ["--master_addr=localhost", f"--master_port={free.getsockname()[1]}"]
    command = [sys.executable, *TORCHRUN, f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}", *address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = [[*command, f"--node_rank={i}", str(SCRIPT), *argv] for i in range(nodes)]
    started = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        printed = "".join(process.communicate(timeout=200)[0] for process in started)
    finally:
        for process in started:
            process.terminate()  # of one that hangs: it ends its processes
    assert [process.returncode for process in started] == nodes * [0], printed
    assert printed.count("AFID") == 2  # the table's, by rank 0 alone
    folders = tmp_path, finished("--epochs=2")
    two, one = (r.read_result(folder / "result.json") for folder in folders)
    assert (two["processes"], one["processes"]) == (2, 1)
    ours, theirs = map(read_log, folders)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for k in range(3):
        assert ours[k] == pytest.approx(theirs[k], rel=1e-3, abs=1e-5)
    assert two["fisher"][0]["c_star"] == pytest.approx(one["fisher"][0]["c_star"], rel=1e-4)
    assert two["fid_real"] == pytest.approx(one["fid_real"])
    assert two["afid"] == pytest.approx(one["afid"], rel=1e-2)
    assert contents(tmp_path).keys() == contents(folders[1]).keys()


def test_processes_that_do_not_see_the_same_files_are_stopped(capsys, monkeypatch, tmp_path):
    state = r.State(torch.nn.Linear(1, 1))
    monkeypatch.setattr(r, "world", lambda: 2)
    monkeypatch.setattr(r, "all_sum", lambda v: v + 1)  # the other process stands one task further
    assert_refused(capsys, "same files", main=lambda _: r.load_checkpoint(settings(out=tmp_path), state))


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
    python(*TWO, "-c", ONE_OF_TWO, timeout=120)


# ---- the README's programs
OWN = SCRIPT.with_name("results") / "pages/your-own.md"
BLOCKS = re.findall("```python\n(.*?)```", OWN.read_text(encoding="utf-8"), re.DOTALL)


def run_program(k, **options):
    """The k-th program of that page; in photos/ are four images of each of four classes, some of them grey."""
    for split, c, i in itertools.product(("train", "test"), range(4), range(4)):
        path = Path("photos", split, "abcd"[c], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        bright = torch.randint(60 * c, 60 * c + 40, (1 if i else 3, 50, 40)).to(torch.uint8)
        torchvision.io.write_png(bright, str(path)) if not path.exists() else None
    before = BLOCKS[:k] if "model" in BLOCKS[k] else []  # it goes on with the names of the first
    program = "".join([*before, BLOCKS[k]])
    return python("-c", program, cwd=None, env={"PYTHONPATH": str(SCRIPT.parent)}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(BLOCKS)))
def test_the_programs_for_your_own_training_and_images_run_as_they_stand(k):
    if "diffusers" in BLOCKS[k]:
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    run_program(k)


@pytest.mark.slow
def test_the_loader_of_folders_refuses_other_classes_and_images_that_it_would_flatten():
    path = Path("photos/test/a/0.png")
    path.parent.mkdir(parents=True)
    Image.new("RGBA", (50, 40)).save(path)
    assert f"{path} has mode RGBA" in run_program(2, check=False).stderr
    path.unlink()
    Path("photos/train/D").mkdir()
    Path("photos/train/a/0.png").rename("photos/train/D/0.png")
    refused = run_program(2, check=False)
    assert (refused.returncode, "['D', 'a', 'b', 'c', 'd'] to train" in refused.stderr) == (2, True)


# ---- results/beyond.py: F's top eigenvectors, a part of the timesteps, the proximal step
@pytest.mark.parametrize("k", [1, 4])
def test_rank_k_fisher_is_the_best_of_rank_k_for_the_per_sample_gradients(k):
    model = Denoiser()
    g, _ = gradients_of_both_passes(model, *small_images(), 12)  # F = g^T g / 12
    v, values = beyond.rank_k_fisher(model, *small_images(), 12, generator(3), k=k)
    _, singular, directions = torch.linalg.svd(g / math.sqrt(12), full_matrices=False)
    torch.testing.assert_close(values.double(), singular[:k] ** 2, rtol=1e-3, atol=0)
    cosines = (v.double() @ directions[:k].T).abs()
    torch.testing.assert_close(cosines, torch.eye(k).double(), atol=1e-2, rtol=0)


def test_rank_k_fisher_keeps_no_more_gradients_than_fit_and_refuses_fewer_than_directions(monkeypatch):
    model, shapes = Denoiser(), []
    weights = len(weights_of(model))
    spy(monkeypatch, beyond, "eigenpairs", lambda out, G, k: shapes.append(G.shape))
    for fit, most in ((5, 1024), (100, 7)):
        monkeypatch.setattr(beyond, "GRADIENT_FLOATS", fit * weights)
        monkeypatch.setattr(beyond, "GRADIENTS", most)
        beyond.rank_k_fisher(model, *small_images(), 12, generator(), k=2)
    assert shapes == [(5, weights), (7, weights)]
    with pytest.raises(ValueError, match="rank 2 needs at least 2 gradients, not 1"):
        beyond.rank_k_fisher(model, *small_images(), 1, generator(), k=2)


def test_the_isotropic_fisher_has_the_trace_of_the_diagonal_and_no_direction():
    alike = beyond.isotropic_fisher(small_unet(), *small_images(), 12, generator(3))
    diagonal = r.diagonal_fisher(small_unet(), *small_images(), 12, generator(3))
    torch.testing.assert_close(alike.sum(), diagonal.sum())
    assert (alike == alike[0]).all()


@pytest.mark.parametrize(("first", "end"), [(0, 333), (333, 667), (667, 1000), (700, 701)])
def test_a_part_of_the_timesteps_is_taken_evenly_and_with_the_same_images_and_noise(first, end):
    x0, t, eps, y = small_batch(128)
    part = beyond.squeezed(torch.arange(1000), first, end).bincount()[first:]
    assert len(part) == end - first and 0 < part.max() <= part.min() + 1
    exact = r.per_sample_loss(Denoiser(), x0, beyond.squeezed(t, first, end), eps, y)
    torch.testing.assert_close(beyond.loss_in(first, end)(Denoiser(), x0, t, eps, y), exact)


@pytest.mark.parametrize("eta", [1e-3, 10.0])
def test_the_proximal_step_minimizes_penalty_plus_distance(eta):
    _, fishers, stars, theta = three_tasks()[0]
    z, formula = torch.nn.Linear(50, 1, bias=False), penalty_of(r.Rank1Penalty, fishers, stars)
    z.weight.data.copy_(theta)
    penalty_of(beyond.ProximalPenalty, fishers, stars).after_step(z, eta)
    minimized = lambda z: formula(z) + (z - theta).square().sum() / (2 * eta)
    gradient = value_and_gradient(minimized, weights_of(z))[1]
    assert gradient.norm() < 1e-3 * value_and_gradient(formula, theta)[1].norm()


def test_a_stiff_proximal_step_keeps_the_weights_where_the_old_tasks_want_them(tiny):
    drifts = (tiny(f"--lam={lam}", "--method=rank1-proximal", out=lam)[0]["drift"] for lam in ("1e9", "0"))
    for held, moved in zip(*drifts):
        assert max(map(abs, held)) < 0.01 * max(map(abs, moved))


@pytest.mark.slow
def test_beyond_takes_the_scripts_flags_and_refuses_fewer_samples_than_directions(tmp_path):
    command = ["-m", "results.beyond", "--method=rank4", "--tasks=2", *QUICK, "--out", tmp_path]
    assert "digits, rank4: FID" in python(*command).stdout
    refused = python(*command, "--fisher-samples=3", check=False)
    assert refused.returncode == 2
    assert "--fisher-samples must be at least 4 with --method rank4" in refused.stderr


# ---- results/geometry.py: what a trained model says
def test_the_geometry_from_the_gram_matrix_is_that_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(beyond, "GRADIENTS", 12)
    model = torch.nn.Linear(16, 16, bias=False)
    model.forward = lambda x, t, y: (x.flatten(1) @ model.weight.T).view_as(x)
    data = r.Data(*small_images(size=4), *small_images(size=4))
    numbers, mu, cos = geometry.geometry(model, data)
    draws = [geometry.samples(data, 12, draw=draw) for draw in ("figure", "fresh")]
    g, fresh = (gradients_one_by_one(model, draw).numpy() for draw in draws)  # (12, 256)
    F, mean, norm, length = g.T @ g / 12, g.mean(0), np.linalg.norm(g.mean(0)), np.linalg.norm(g, axis=1)
    values, vectors = np.linalg.eigh(F)
    top, trace, c_star = vectors[:, -1], np.trace(F), mean @ F @ mean / norm**4
    matrices = {"diagonal": np.diag(np.diag(F)), "mu mu^T": np.outer(mean, mean)}
    matrices["c* mu mu^T"] = c_star * np.outer(mean, mean)
    matrices["best of rank 1"] = values[-1] * np.outer(top, top)
    exact = {"c_star": c_star, "mu_norm": norm, "mu_noise": math.sqrt(trace / 12), "energy": c_star * norm**2}
    exact |= {"trace": trace, "eigenvalues": values[:-6:-1], "top_share": values[-1] / trace}
    exact |= {"cos_mu_top": abs(top @ mean) / norm, "cos_top": (abs(g @ top) / length).mean()}
    relative = lambda F, A: np.linalg.norm(F - A) / np.linalg.norm(F)
    exact["error"] = {name: relative(F, A) for name, A in matrices.items()}
    exact["error_fresh"] = {name: relative(fresh.T @ fresh / 12, A) for name, A in matrices.items()}
    exact["error_fresh"]["F itself"] = relative(fresh.T @ fresh / 12, F)
    assert numbers.keys() == exact.keys()
    for name, value in exact.items():
        assert numbers[name] == pytest.approx(value, rel=1e-3), name
    assert mu.numpy() == pytest.approx(mean, abs=1e-6, rel=1e-4)
    assert cos.numpy() == pytest.approx(abs(g @ mean) / length / norm, abs=1e-3)


def test_where_gradients_have_no_direction_rank_1_beats_the_diagonal_only_on_those_that_made_it(monkeypatch):
    monkeypatch.setattr(beyond, "GRADIENTS", 12)  # fewer than the root of the number of weights
    model, data = torch.nn.Linear(256, 1, bias=False), r.Data(*small_images(size=16), *small_images(size=16))
    isotropic = lambda model, x0, t, eps, y: model(eps.flatten(1))[:, 0]  # g = eps: F is the identity
    numbers, _, _ = geometry.geometry(model, data, loss=isotropic)
    for name in ("mu mu^T", "c* mu mu^T", "best of rank 1"):
        assert numbers["error"][name] < numbers["error"]["diagonal"]
        assert numbers["error_fresh"][name] > 1 > numbers["error_fresh"]["diagonal"]  # 1: of A = 0


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
        torch.testing.assert_close((same_x0, same_eps, same_y), (x0, eps, y), rtol=0, atol=0)
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
def test_a_figure_of_a_run_or_its_first_task_comes_with_its_numbers(tmp_path, finished, monkeypatch, figure):
    monkeypatch.setattr(beyond, "GRADIENTS", 20)
    monkeypatch.setattr(geometry, "TIMES", [100, 700])
    monkeypatch.setattr(geometry, "VAE_STEPS", [0, 5])
    run, to = finished(), tmp_path / "new/figure"
    before, of = contents(run), " ".join(QUICK) if "--first-task" in figure else str(run)
    geometry.main([*figure.split(), of, "--to", str(to)])
    numbers = json.loads(to.with_suffix(".json").read_text())
    assert numbers["samples"] == (200 if "movement" in figure else 20)
    assert (numbers["config"]["method"], numbers["config"]["channels"]) == ("rank1", [16])
    assert torchvision.io.decode_image(str(to.with_suffix(".png"))).float().std() > 1
    if figure == "3":
        lines, at = to.with_suffix(".md").read_text().splitlines(), numbers["all timesteps"]
        shape, errors = ([cell.strip() for cell in line.split("|")] for line in lines if "random t" in line)
        assert shape[2] == f"{at['c_star']:.2g}"
        assert errors[4] == f"{at['error']['c* mu mu^T']:.3f} / {at['error_fresh']['c* mu mu^T']:.3f}"
    assert contents(run) == before


def test_relearning_trains_on_task_1_alone_and_takes_its_fid_as_the_run_does(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(geometry, "RELEARNING", [0, 2, 3])
    folders, final = {"gd": [], "rank1": []}, {}
    for method, seed in itertools.product(folders, "10"):
        folders[method].append(str(tmp_path / f"{method}{seed}"))
        result, _ = tiny("--tasks=2", "--seed", seed, "--method", method, out=f"{method}{seed}")
        final[method, seed] = result["fid"][-1][0]
    trained = []
    spy(monkeypatch, r, "train_step", lambda _, *call: trained.append((*call, call[0].training)))
    to = str(tmp_path / "to")
    geometry.main(["relearning", *folders["rank1"], "--against", *folders["gd"], "--to", to])
    lines = [line.split(",") for line in Path(f"{to}.csv").read_text().splitlines()[1:]]
    fid = {(row.split()[0], seed, steps): float(value) for seed, row, steps, value in lines}
    assert {of[:2]: value for of, value in fid.items() if of[2] == "0"} == final

    assert len(trained) == 12
    for _, teacher, penalty, optimizer, *_, training in trained:
        assert teacher is penalty is None and training
        assert optimizer.param_groups[0]["lr"] == pytest.approx(4e-4)
    draws = [call[4] for call in trained]
    torch.testing.assert_close(draws[:6], draws[6:], rtol=0, atol=0)  # the same for both rows
    assert not draws[0][2].equal(draws[3][2]) and torch.cat([batch[3] for batch in draws]).max() < 5
    cfg, model, data = geometry.load_run(tmp_path / "gd1", Path(), "cpu")
    adam, task = torch.optim.Adam(model.parameters(), lr=4e-4), r.split_tasks(data, 2)[0]
    for batch in draws[-3:]:
        adam.zero_grad()
        papers_loss(model, *batch).mean().backward()
        adam.step()
    sampled = r.evaluate(cfg, model, [task], four_pixels, CPU)[0]
    assert fid["gd", "1", "3"] == pytest.approx(
        r.frechet_distance(four_pixels(task.test_x), sampled), rel=1e-3
    )


def test_two_rows_relearning_are_compared_seed_by_seed():
    ours, base = torch.rand(2, 5, 6, generator=generator()).double().numpy() + 20
    texts, _ = geometry.compare_relearning({"rank1": ours, "gd": base}, [5, 6, 7, 8, 9], 18.0)
    assert f"9,gd,100,{base[4, 5]}" == texts["csv"].splitlines()[-1]
    row = [cell.strip() for cell in texts["md"].splitlines()[7].split("|")]  # after 100 steps
    low, high = scipy.stats.ttest_rel(ours[:, 5], base[:, 5]).confidence_interval()
    mean, whole = (ours - base)[:, 5].mean(), base[:, 5].mean() / 100
    assert row[1:4] == ["100", f"{ours[:, 5].mean():.1f}", f"{base[:, 5].mean():.1f}"]
    assert row[4] == f"{mean:+.2f} ({low:.2f} to {high:.2f})"
    assert row[5] == f"{mean / whole:+.1f}%, {low / whole:.1f} to {high / whole:.1f}"


def test_relearning_refuses_runs_that_cannot_be_paired_or_have_no_model(tiny, tmp_path, capsys):
    result, _ = tiny("--tasks=2", "--method=gd")
    kinds = {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 2, "epochs": 2}}
    for method, out in itertools.product(("gd", "rank1"), kinds):
        config = result["config"] | kinds[out] | {"method": method}
        r.write_json(tmp_path / f"{method}-{out}/result.json", result | {"config": config})
        (tmp_path / f"{method}-{out}/model.pt").write_bytes((tmp_path / "run/model.pt").read_bytes())
    capsys.readouterr()

    def refused(words, runs, against):
        runs, against = ([tmp_path / name for name in names.split()] for names in (runs, against))
        argv = ["relearning", *runs, "--against", *against, "--to", "to"]
        assert_refused(capsys, words, *argv, main=geometry.main)

    refused("within a row --seed alone", "rank1-a rank1-b", "gd-a gd-c")
    refused("between the rows --method", "rank1-a rank1-c", "gd-a gd-b")
    refused("between the rows --method", "gd-a gd-b", "gd-a gd-b")
    refused("same seeds two [1, 2] [1, 1]", "rank1-a rank1-b", "gd-a gd-a")
    refused("same seeds two [1] [1]", "rank1-a", "gd-a")
    (tmp_path / "gd-b/model.pt").unlink()
    refused("gd-b/model.pt missing --fresh", "rank1-a rank1-b", "gd-a gd-b")
    assert_refused(capsys, "relearning --against --to", "relearning", tmp_path / "gd-a", main=geometry.main)


# ---- results/report.py: what finished runs say together
def hand_made_run(folder, method="gd", seed=0, afid=20.0, **other):
    """A result.json of two tasks, of no real run, and a picture; `other`: parts of it, or settings."""
    run = {"dataset": "fashion", "method": method, "lam": 0.0, "seed": seed, "fid_features": "inception"}
    run |= {"fid": [[5.0, None], [afid + 2, afid - 2]], "afid": [5.0, afid], "forgetting": 2.0, "data": None}
    run |= {"fid": [[afid, afid]], "afid": [afid], "forgetting": None} if method == "joint" else {}
    run |= {"fid_real": [1.0, 1.0], "fisher": [], "drift": [], "fid_pooled": None, "script": "0123"}
    run |= {name: value for name, value in other.items() if name in run}
    usual = r.settings_of(r.parse_args(["--dataset", run["dataset"]]))
    run["config"] = usual | {name: value for name, value in other.items() if name not in run}
    r.write_json(folder / "result.json", run)
    torchvision.utils.save_image(torch.zeros(3, 70, 346), folder / "samples-task1.png")
    return folder


def reported(*argv, to, measure="AFID"):
    """The lines of the CSV that the report writes to a name, or into a folder, of one measure."""
    report.main([*map(str, argv), "--to", str(to)])
    path = to / "table1.csv" if to.is_dir() else to.with_suffix(".csv")
    lines = csv.DictReader(path.read_text().splitlines())
    return [line for line in lines if line["measure"] == measure]


def test_table_1_has_means_errors_differences_from_gd_the_papers_numbers_and_both_pictures(tmp_path, capsys):
    for seed, afid in enumerate((20.0, 26.0)):
        hand_made_run(tmp_path / f"gd{seed}", "gd", seed, afid)
    hand_made_run(tmp_path / "joint", "joint", fid_pooled=6.0)
    fisher = [{"energy": energy, "c_star": 4.0, "mu_norm": 0.5} for energy in (1.0, 2.0)]
    hand_made_run(tmp_path / "rank1", "rank1", 0, 18.0, lam=10.0, fisher=fisher, drift=[[1.0, 1.0]])
    _, gd, rank1 = reported(tmp_path, to=tmp_path)
    assert [float(gd[name]) for name in ("mean", "standard_error")] == pytest.approx([23, 3])
    assert [rank1[name] for name in ("curvature", "against", "difference")] == ["15", "gd", "-2"]
    text = (tmp_path / "table1.md").read_text(encoding="utf-8")
    told = (
        "23.0 ± 3.0|-2.00, -10.0%|15.4 / 0.9|6.0 |lam 10 (paper 15000)|training images have 1.0|0123 (4 runs)"
    )
    assert [words for words in told.split("|") if words not in text] == [] and text in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"figure4.png", "figure5.png"}
    for picture in tmp_path.glob("*/samples-task1.png"):  # without any there is no Figure 5
        picture.unlink()
    report.main([str(tmp_path), "--to", str(tmp_path / "other")])
    assert [path.name for path in (tmp_path / "other").glob("*.png")] == ["figure4.png"]


def test_runs_of_different_datasets_or_features_stay_apart_in_one_report(tmp_path):
    expected = [
        ("digits", "x", "20", ""),
        ("fashion", "inception", "2", "15.4 / 0.9"),
        ("fashion", "x", "5", ""),
    ]
    for (dataset, features, add, _), method in itertools.product(expected, ("gd", "rank1")):
        afid, folder = 20 + float(add) * (method == "rank1"), tmp_path / dataset / features / method
        hand_made_run(folder, method, 0, afid, dataset=dataset, fid_features=features)
    lines = [line for line in reported(tmp_path, to=tmp_path) if line["method"] == "rank1"]
    columns = "dataset", "fid_features", "difference", "paper"
    assert [tuple(line[name] for name in columns) for line in lines] == expected
    assert len([*tmp_path.glob("figure5-*.png")]) == 3


def test_the_baseline_of_a_run_is_gd_alone_and_of_gd_with_a_flag_gd_without_it(tmp_path):
    small = {name: value for name, value in r.SMALL.items() if name not in ("lam", "fid")}
    rank1, ema, pool = {"method": "rank1", "lam": 10.0}, {"ema": 0.9}, {"replay_per_class": 10}
    rows = {"small": small, "small ema": small | {"lr": 2e-3, "lr_decay": "none", "ema": 0.9}, "gd": {}}
    rows |= {"ema": ema, "pool": pool, "both": ema | pool, "seed": rank1 | {"seed": 1}}
    rows |= {"rank1": rank1, "rank1 ema": rank1 | ema, "rank1 epochs": rank1 | {"epochs": 7}}
    runs = report.read_runs([hand_made_run(tmp_path / name, **other) for name, other in rows.items()])
    names = runs["folder"].map(lambda folder: folder.name)
    found = {name: names[i] for name, i in zip(names, report.find_baselines(runs)) if i >= 0}
    # Of "both" it could be ema or pool.
    assert found == {"small ema": "small", "ema": "gd", "pool": "gd", "rank1": "gd", "rank1 ema": "ema"}


def test_a_row_is_named_with_what_sets_it_apart_and_an_older_runs_method_as_it_is_called_now(tmp_path):
    for name, other in enumerate(({}, {"form": "proximal"}, {"fisher_timesteps": [0, 333], "ema": 0.9})):
        hand_made_run(tmp_path / str(name), "rank1", lam=10.0, **other)
    assert [*report.read_runs([tmp_path])["line"]] == ["rank1", "rank1-low --ema 0.9", "rank1-proximal"]


def test_runs_that_cannot_be_reported_together_are_refused_in_one_line(tmp_path, capsys):
    other_runs = {
        "are the same row and seed": {},
        "learned different data": {"method": "rank1", "data": "cdef"},
    }
    other_runs |= {"/b/result.json gdd": {"method": "gdd"}, "damaged or lacks parts": {"fid": [[5.0, None]]}}
    hand_made_run(tmp_path / "a", data="0123")
    for words, other in other_runs.items():
        hand_made_run(tmp_path / "b", **other)
        assert_refused(capsys, f"{words} {tmp_path}", tmp_path, main=report.main)


def test_a_comparison_has_the_means_over_a_setting_and_the_differences_from_gd(tmp_path):
    for seed, afid in enumerate((20.0, 26.0)):
        hand_made_run(tmp_path / f"gd{seed}", "gd", seed, afid)
        for lam in (10.0, 100.0, 1000.0):
            hand_made_run(tmp_path / f"rank1-{lam}-{seed}", "rank1", seed, afid + lam / 100, lam=lam)
    lines = reported(*tmp_path.iterdir(), "--over", "lam", to=tmp_path / "new/lambda")
    assert [line["lam"] for line in lines] == ["", "10", "100", "1000"]
    assert [float(lines[3][name]) for name in ("mean", "standard_error")] == pytest.approx([33, 3])
    assert [float(line["difference"]) for line in lines[1:]] == pytest.approx([0.1, 1, 10])
    assert (tmp_path / "new/lambda.png").stat().st_size > 10_000


def test_a_comparison_with_another_row_than_gd_has_the_interval_of_a_paired_t_test(tmp_path, capsys):
    afids = {"gd": (10.0, 10.0, 10.0), "rank1": (20.0, 26.0, 22.0), "rank1-eig": (18.5, 25.0, 23.0)}
    runs = {method: [] for method in afids}
    for method, seed in itertools.product(afids, range(3)):
        runs[method].append(hand_made_run(tmp_path / f"{method}-{seed}", method, seed, afids[method][seed]))
    command = [*runs["rank1-eig"], "--over", "lam", "--against", *runs["rank1"]]
    (afid,) = reported(*command, to=tmp_path / "direct")
    interval = scipy.stats.ttest_rel(afids["rank1-eig"], afids["rank1"]).confidence_interval(0.95)
    found = [float(afid[name]) for name in ("difference", "low", "high", "share", "share_low", "share_high")]
    expected = np.array([-0.5, *interval])
    assert found == pytest.approx([*expected, *(100 * expected / np.mean(afids["rank1"]))])
    assert (afid["against"].split()[0], afid["pairs"], afid["seeds"]) == ("rank1", "3", "0-2")
    assert_refused(capsys, "--against", *command, *runs["gd"], "--to", tmp_path / "x", main=report.main)


def test_the_rise_from_best_is_from_the_lowest_fid_after_any_earlier_task_that_had_learned_it(tmp_path):
    fid = [[9.0, None, None], [4.0, 8.0, None], [7.0, 6.0, 5.0]]
    run = report.read_run(hand_made_run(tmp_path, fid=fid, fid_real=[1.0, 1.0, 1.0]) / "result.json")
    assert run["rise from best"] == ((7 - 4) + (6 - 8)) / 2


def test_of_ten_seeds_it_tells_how_old_tasks_changed_and_whether_both_halves_agree(tmp_path):
    for seed in range(10):
        hand_made_run(tmp_path / f"gd{seed}", "gd", seed)
        hand_made_run(tmp_path / f"rank1{seed}", "rank1", seed, 20 + seed % 5 / 10 + (seed > 4))
    reported(tmp_path, to=tmp_path)
    text, first = (tmp_path / "table1.md").read_text(encoding="utf-8"), np.arange(5) / 10
    t, ranks = (test(first, first + 1).pvalue for test in (scipy.stats.ttest_ind, scipy.stats.mannwhitneyu))
    assert "- gd, change of each old task's FID since it was learned: +17.0." in text
    assert (
        f"+0.20 on seeds 0-4, +1.20 on seeds 5-9 (are these alike? p = {t:.1g} by Welch's t, {ranks:.1g}"
        in text
    )


def test_drift_is_told_along_unit_vectors_and_c_star_and_mu_where_there_is_a_mu(tmp_path):
    fisher = [{"mu_norm": n, "c_star": c, "energy": 1.0} for n, c in ((2.0, 128.0), (0.5, 14.04))]
    hand_made_run(tmp_path / "a", "rank4", fisher=fisher, drift=[[9.0], [4.0, -4.0, 1.0, 1.0]])
    hand_made_run(tmp_path / "b", "rank1", fisher=fisher, drift=[[9.0], [4.0, -1.0]])
    rank1, rank4 = (report.of_penalty(row) for _, row in report.read_runs([tmp_path]).groupby("line"))
    assert rank4 == {"curvature": 0, "c*": None, "norm of mu": None, "drift": 2}
    assert rank1 == {"curvature": 0, "c*": "14 to 130", "norm of mu": "0.5 to 2", "drift": 2}


def test_a_tally_counts_each_row_of_a_penalty_that_is_added_to_gd_once():
    rows = ["line,lam,seeds,against,measure,pairs,difference,low,high", "rank1,10,0-4,gd,AFID,5,-1,-2,-0.5"]
    rows += ["diag,1,0-4,gd,AFID,5,2,1,3", "rank1,1,0-4,gd,AFID,5,0,-1,1", "rank2,1,0-4,rank1,AFID,5,2,1,3"]
    rows += ["rank1,10,0-4,gd,forgetting,5,-1,-2,-1", "gd --ema 0.9,,0-4,gd,AFID,5,-3,-4,-2"]
    Path("a.csv").write_text("\n".join(rows))
    Path("b.csv").write_text("\n".join(rows[:3]).replace("line", "method"))
    report.main(["--tally", "a.csv", "b.csv", "--to", "tally.md"])
    text = Path("tally.md").read_text()
    assert "in 3 rows" in text and "below 0 in 1 of them and above 0 in 1;" in text
    assert text.count("| a ") == 2 and "-1.00 (-2.00 to -0.50)" in text


@pytest.mark.slow
def test_a_finished_runs_model_generates_images_of_the_classes_that_are_asked_for(finished, tmp_path, capsys):
    run, to = finished(), tmp_path / "images.png"
    report.main(["--sample", str(run), "--classes", "3,7", "--to", str(to)])
    assert torchvision.io.read_image(str(to)).shape == (3, 2 * 66 + 2, 10 * 66 + 2)
    assert_refused(capsys, "--classes 10 0 to 9", "--sample", run, "--classes", "3,10", main=report.main)
    run, none = hand_made_run(tmp_path), tmp_path / "none"
    assert_refused(capsys, "model.pt is missing", "--sample", run, "--classes", "3", main=report.main)
    assert_refused(capsys, f"{none} no finished run", "--sample", none, "--classes", "3", main=report.main)


@pytest.mark.slow
def test_a_model_whose_weights_are_not_finite_or_that_learned_other_images_is_not_looked_at(
    finished, tmp_path, capsys, monkeypatch
):
    run, (load, files) = shutil.copytree(finished(), tmp_path / "run"), r.LOADERS["digits"]
    with monkeypatch.context() as patch:
        patch.setitem(r.LOADERS, "digits", (lambda _: load(_)._replace(x=load(_).x.flip(3)), files))
        assert_refused(capsys, f"{run} other images --data-dir", "1", run, main=geometry.main)
    weights = torch.load(run / "model.pt", weights_only=True)
    weights["conv_in.bias"][0] = math.nan
    torch.save(weights, run / "model.pt")
    assert_refused(capsys, "model.pt not finite", "--sample", run, "--classes", "3", main=report.main)
    assert_refused(capsys, "model.pt not finite", "1", run, main=geometry.main)


def test_a_text_includes_the_tables_as_their_files_now_are():
    Path("table.md").write_text("| new ± |\n", encoding="utf-8")
    text = 2 * "before\n<!-- include: table.md -->\n{}<!-- end -->\nafter\n"
    Path("README.md").write_text(text.format("| old |\n", "| old |\n"), encoding="utf-8")
    report.main(["--include", "README.md"])
    assert Path("README.md").read_text(encoding="utf-8") == text.format("| new ± |\n", "| new ± |\n")


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_exercises_table_has_the_numbers_of_its_runs_and_its_changes_of_the_script_apply():
    page = SCRIPT.with_name("results") / "pages/exercises.md"
    rows = re.findall(
        r"^\| .* \| `(.*)` \| (.*) \| (.*) \| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) == 14
    for run, *numbers in rows:
        result = r.read_result(page.parents[1] / "runs" / run / "result.json")
        learned = np.diag(np.array(result["fid"], float)).mean()
        assert numbers == [f"{value:.1f}" for value in (result["afid"][-1], result["forgetting"], learned)]
    studies = page.parents[1].joinpath("studies.mk").read_text(encoding="utf-8")
    for change in re.findall("^[a-z-]+ = (s[/|].*)$", studies, re.MULTILINE):
        changed = subprocess.run(["sed", change, SCRIPT], capture_output=True, text=True, check=True).stdout
        more = len(changed.splitlines()) - len(SCRIPT.read_text(encoding="utf-8").splitlines())
        assert changed != SCRIPT.read_text(encoding="utf-8") and more in (0, 1)
        compile(changed, "changed", "exec")


def test_the_readmes_map_names_functions_and_tests_that_are_there():
    text = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    rows = re.search(
        "## From the paper to the code.*?(?=^Deviations)", text, re.DOTALL | re.MULTILINE
    ).group()
    names = re.findall("`([a-z_A-Z0-9]+)`", rows)
    assert len(names) > 25
    assert [name for name in names if not hasattr(r, name) and name not in globals()] == []


def test_every_link_and_picture_of_the_texts_leads_somewhere():
    root, broken = SCRIPT.parent, []
    paths = [*root.glob("*.md"), *root.glob("results/**/*.md")]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    anchors = {path: {*map(anchor, re.findall("^#+ (.*)$", texts[path], re.MULTILINE))} for path in texts}
    for path, text in texts.items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        links = re.findall(r'(?:\]\(|src=")([^)\s"]+)', prose)
        tables = re.findall("<!-- include: (.+?) -->", prose)
        for link in [link for link in links if "://" not in link]:
            to, _, heading = link.partition("#")
            target = (path.parent / to).resolve() if to else path
            if not target.exists() or heading and heading not in anchors.get(target, ()):
                broken.append((str(path.relative_to(root)), link))
        broken += [(path.name, table) for table in tables if not (root / table).exists()]
    assert broken == []


@pytest.mark.slow
def test_bench_does_the_same_work_both_ways_in_parts_and_in_whole_runs(tmp_path):
    lines = bench.main(["--small", "--to", str(tmp_path)])
    assert len(lines) == 9
    for name, line in lines.items():
        assert line["difference"] <= (line["same to"] or 0.05), name  # 0.05: in bfloat16, on a GPU
    (table,) = tmp_path.glob("bench-*.md")
    assert all(f"| {name} " in table.read_text() for name in lines)


def test_tricks_are_measured_row_by_row_and_one_that_fails_or_cannot_be_is_noted(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.shutil, "which", lambda _: None)  # no compiler: it would take minutes
    monkeypatch.setattr(r, "rank1_fisher", Mock(side_effect=RuntimeError("too\nlittle memory")))
    rows = bench.main(["--tricks", "--small", "--to", str(tmp_path)])
    for work in ("training step", "sampling"):
        assert [rows[work, name]["difference"] for name in ("float32", "bfloat16")] == [
            0,
            pytest.approx(0, abs=0.3),
        ]
        exact = rows[work, "bfloat16"]["difference"]
        assert rows[work, "channels_last"]["difference"] == pytest.approx(exact, abs=0.05)
        assert len(rows[work, "channels_last"]["ms"]) == 1
        assert rows[work, "torch.compile"]["note"] == "needs a C++ compiler"
    assert rows["mu and c*", "float32"]["note"] == "failed: RuntimeError: too little memory"
    assert rows["mu and c*", "torch.compile"]["note"] == "torch.compile has no second derivative"
    (table,) = tmp_path.glob("tricks-*.md")
    assert table.read_text().count("\n| ") == 1 + len(rows)
    assert not any(row["ms"] for row in bench.main(["--tricks", "--small", "--minutes=0"]).values())


# ---- bad input: one line on stderr that says what to do, status 2, before any training
PIXELS, LABELS = np.zeros((44, 3072), np.uint8), np.arange(44) % 20 + 1
IDX, NPZ = "MNIST/raw/train-images-idx3-ubyte", "imagenet32/train_data_batch_7.npz"
WRONG_FILES = [  # wrong: nothing in the file's place, the byte of it that is another, or other arrays
    ("mnist", IDX, None, "MNIST/raw"),
    ("mnist", IDX, 2, "MNIST/raw"),
    ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte", 9, "mnist label"),
    ("cifar10", f"{CIFAR}/data_batch_3", None, "cifar-10-python.tar.gz"),
    (
        "cifar10",
        f"{CIFAR}/data_batch_3",
        500,
        "cifar-10-python.tar.gz",
    ),  # its checksum is another: pickles could do anything
    ("imagenet32", NPZ, None, "batch_7.npz"),
    ("imagenet32", NPZ, 5000, "batch_7.npz damaged"),
    ("imagenet32", NPZ, {"data": PIXELS}, "batch_7.npz labels"),
    ("imagenet32", NPZ, {"data": PIXELS[:, :3000], "labels": LABELS}, "batch_7.npz 3000 3072"),
    ("imagenet32", NPZ, {"data": PIXELS.astype(float), "labels": LABELS}, "batch_7.npz uint8"),
    ("imagenet32", NPZ, {"data": PIXELS, "labels": np.array([{}] * 44)}, "batch_7.npz allow_pickle=False"),
    ("imagenet32", NPZ, {"data": PIXELS, "labels": np.arange(44) + 1}, "imagenet32 label"),
]
WRONG = "--dataset=digit --fid=vgg --device=tpu --device=cuda:99 --frobnicate --seed=-1 --lam=-1 --lam=inf"
WRONG += " --lam=many --lr=0 --dropout=1 --ema=1 --limit=1 --epochs=0 --epochs=1.5 --epochs=1000000000000"
WRONG += " --channels=0 --channels=32;64"
REFUSED = [
    *WRONG.split(),
    "--method=rank3 | --method rank3 gd diag rank1",
    "--lam=nan | --lam nan from 0",
    "--sample-steps=1001 | --sample-steps 1001 to 1000",
    "--tasks=3 | --tasks 3 10 divisor",
    "--channels=8,12 | --channels multiples of 8",
    "--channels=8,8,8,8 | --channels levels 8x8",
    "--batch-size=10 --accumulate=3 | --batch-size 10 3 images classes 0 to 1",
    "--out=/dev/null/out | /dev/null/out written",
    "--out= | --out folder",
    "--lr=1e12 | task 1 finite epoch --lr 1e+12 --lam",
]


@pytest.mark.parametrize("row", REFUSED)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it_and_says_what_would_do(capsys, row):
    argv, _, words = row.partition(" | ")
    assert_refused(capsys, words or argv.replace("=", " "), *argv.split())


GOOD = r.Data(*small_images(40), 255 - small_images(20)[0], small_images(20)[1])
UNFIT = [  # what a loader returns in the place of parts of GOOD, and the words that say so
    ({"x": GOOD.x.float() / 255}, "training images uint8 Tensor torch.float32 (40, 1, 8, 8)"),
    ({"test_x": GOOD.test_x.long()}, "test images uint8 Tensor torch.int64"),
    ({"x": GOOD.x[:, 0]}, "training images (N, C, H, H) (40, 8, 8)"),
    ({"x": GOOD.x[..., 1:]}, "training images (N, C, H, H) (40, 1, 8, 7)"),
    ({"x": GOOD.x.numpy()}, "training images Tensor ndarray uint8"),
    ({"y": [*GOOD.y]}, "training labels Tensor int64 list"),
    ({"y": GOOD.y[:, None].expand(-1, 8)}, "training labels (N,) (40, 8)"),  # as QMNIST's are
    ({"test_y": GOOD.test_y.float()}, "test labels torch.int64 torch.float32"),
    ({"y": GOOD.test_y}, "training images (40, 1, 8, 8) 20 training labels"),
    ({"test_x": GOOD.x[:0], "test_y": GOOD.y[:0]}, "test images (0, 1, 8, 8) 0 test labels"),
    ({"x": GOOD.x[:, :0]}, "training images (40, 0, 8, 8)"),
    ({"test_x": GOOD.x.flip(0), "test_y": GOOD.y.flip(0)}, "100% test images are training images"),
    ({"test_x": GOOD.test_x[..., 4:, 4:]}, "training images (40, 1, 8, 8) test images (20, 1, 4, 4)"),
    ({"y": GOOD.y + 1, "test_y": GOOD.test_y + 1}, "label 0 0 training images"),
    ({"y": GOOD.y - 1}, "training labels must be 0, 1, 2 not -1 to 8"),
    ({"test_y": GOOD.test_y + 10**9}, "test labels must be 0, 1, 2 not 1000000000 to 1000000009"),
    ({"test_y": GOOD.test_y.clamp(max=8)}, "label 9 0 test images"),
]


@pytest.mark.parametrize(("wrong", "words"), UNFIT)
def test_images_and_labels_that_do_not_fit_together_are_refused_with_what_was_found(
    capsys, monkeypatch, tmp_path, wrong, words
):
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: GOOD._replace(**wrong), ""))
    assert_refused(capsys, f"digits {words} loader", *QUICK, "--out", tmp_path)


def test_a_classifier_no_better_than_chance_stops_the_run_also_with_inception(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(r, "inception_features", Mock())
    data = r.load_digits(tmp_path)
    shuffled = data._replace(test_y=data.test_y[torch.randperm(800, generator=generator())])
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: shuffled, ""))
    for fid in ("classifier", "inception"):
        argv = f"--fid={fid}", "--out", tmp_path / "run"
        assert_refused(capsys, "chance 10.0% labels digits", *QUICK, *argv)


def test_inception_is_not_given_images_of_four_channels(capsys, monkeypatch, tmp_path):
    four = r.Data(*(v.expand(-1, 4, -1, -1) if v.ndim == 4 else v for v in GOOD))
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: four, ""))
    assert_refused(capsys, "1 or 3 channels 4 --fid", *QUICK, "--fid=inception", "--out", tmp_path / "run")


def test_features_that_are_not_finite_are_refused_with_where_they_come_from(capsys):
    broken = lambda _: r.in_parts(lambda images: images / 0, torch.ones(3, 1, 8, 8), CPU)
    assert_refused(capsys, "FID's network not finite weights", main=broken)


def test_training_images_for_comparison_are_as_many_of_each_class_as_the_test_has():
    y, test_y = torch.arange(90).clamp(max=80) // 80, torch.tensor([0, 0, 0, 1, 1, 1])  # 80 and 10 of a class
    task = r.Data(
        (100 * y + torch.arange(90)).to(torch.uint8)[:, None, None, None], y, torch.zeros(6), test_y
    )
    features = Mock(side_effect=lambda images: images[:, :, 0, 0].double().numpy())
    r.fid_of_training_images(settings(), [task], [np.zeros((6, 1))], features)
    (drawn,) = features.call_args.args
    assert (drawn < 100).flatten().tolist() == [True] * 3 + [False] * 3 and len(drawn.unique()) == 6


ROWS = {
    '{"learning_rate": 1}': "DATASETS['digits'] learning_rate",
    '{"lr_decay": "cosine"}': "--lr-decay none, linear 'cosine'",
    '{"tasks": "2"}': "--tasks '2'",
    '{"lam": -5.0}': "--lam from 0 -5.0",
}


@pytest.mark.parametrize("row", ROWS)
def test_a_datasets_own_row_is_examined_as_the_command_line_is(capsys, monkeypatch, row):
    monkeypatch.setitem(r.DATASETS, "digits", r.DIGITS | json.loads(row))
    assert_refused(capsys, ROWS[row], "--epochs=1")


def test_images_of_another_dataset_are_refused_and_changed_ones_noted(capsys, monkeypatch, tmp_path):
    load, files = r.LOADERS["digits"]
    r.load_data("digits", tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(r.LOADERS, "mnist", (load, files))
    monkeypatch.setitem(r.LOADERS, "digits", (lambda _: load(_)._replace(x=load(_).x.flip(3)), files))
    assert_refused(capsys, "images mnist those of digits", main=lambda _: r.load_data("mnist", tmp_path))
    r.load_data("digits", tmp_path)
    assert "digits are not those that were published" in capsys.readouterr().out


@pytest.mark.parametrize("parts", [{"distill": True}, {"fisher": max}, {"penalty": r.Rank1Penalty}])
def test_a_method_that_lacks_a_part_is_refused(capsys, monkeypatch, parts):
    monkeypatch.setitem(r.METHODS, "gd", r.Method(**parts))
    assert_refused(capsys, "METHODS['gd'] replay penalty", "--method=gd")


def test_what_killed_runs_left_half_written_goes_when_the_next_one_begins(tiny, tmp_path):
    for name in (".rank1_ewc-123-checkpoint.pt", "own.pt"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    tiny()
    assert [*(tmp_path / "run").glob(".rank1_ewc-*")] == []
    assert (tmp_path / "run/own.pt").exists()


def test_a_fisher_that_cannot_be_taken_ends_a_run_in_one_line(tiny, capsys, monkeypatch, tmp_path):
    argv, forward = [*TINY, "--out", tmp_path / "run"], r.UNet.forward
    assert_refused(capsys, "rank 4 3 --method", *argv, "--method=rank4", "--fisher-samples=3")
    mixing = lambda model, x, t, y: forward(model, x - x.mean(0), t, y)  # samples, as a batch norm does
    monkeypatch.setattr(r.UNet, "forward", mixing)
    assert_refused(capsys, "Fisher mixes samples --method", *argv, "--fresh")


def test_an_error_that_nobody_foresaw_ends_a_run_with_its_traceback(tiny, monkeypatch):
    monkeypatch.setattr(r, "losses", Mock(side_effect=ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        tiny()


@pytest.mark.parametrize(("name", "file", "wrong", "words"), WRONG_FILES)
def test_data_that_is_missing_or_another_is_refused(capsys, monkeypatch, tmp_path, name, file, wrong, words):
    write_cifar10(tmp_path / CIFAR, monkeypatch)
    write_idx(tmp_path / "MNIST/raw")
    write_npz(tmp_path / "imagenet32")
    path, whole = tmp_path / file, (tmp_path / file).read_bytes()
    path.unlink()
    if type(wrong) is int:
        path.write_bytes(whole[:wrong] + b"M" + whole[wrong + 1 :])
    elif wrong:
        np.savez(path, **wrong)
    argv = "--dataset", name, "--data-dir", tmp_path, "--out", tmp_path / "out"
    assert_refused(capsys, f"{words} {tmp_path}", *argv)


def test_without_inceptions_weights_a_refusal_names_the_classifier(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cleanfid.features.InceptionV3W, "__init__", urllib.request.urlopen)
    assert_refused(capsys, "--fid classifier", "--fid", "inception", "--out", tmp_path)
