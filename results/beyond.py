"""Beyond the paper, and an example of how to extend rank1_ewc.py without editing it.

    python -m results.beyond --method rank4 --lam 25    # all other flags are those of rank1_ewc.py

Methods that are added to METHODS:
rank1-low, rank1-middle, rank1-high: mu and c* of the low, the middle or the high timesteps alone.
rank1-proximal: the paper's penalty, not in the loss but as an exact step after each Adam step.
rank1-eig, rank2, rank4: F's top eigenvectors in mu's place, with their eigenvalues as c*.
isotropic: a control, F's trace spread evenly: a pull to theta* without a preferred direction.
rank1-shuffled: mu of images with shuffled pixels, at the true mu's strength.

A dataset is added too: fashion16, FashionMNIST at 16x16, ten tasks of one class in a random order.

A method of your own needs a Fisher and a penalty as the script describes them, a row in METHODS,
and a program that adds the row and then calls r.program(), as the last lines here do.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import rank1_ewc as r

# ---- The Fisher of some of the timesteps: the same images and noise, with another loss.


def squeezed(t: Tensor, first: int, end: int) -> Tensor:
    """Timesteps 0..999 squeezed into first..end-1."""
    return first + t * (end - first) // r.NUM_STEPS


def loss_in(first: int, end: int) -> Callable:
    """per_sample_loss at timesteps first..end-1."""
    return lambda model, x0, t, eps, y: r.per_sample_loss(
        model, x0, squeezed(t, first, end), eps, y
    )


# ---- The proximal step: decoupled from Adam, as AdamW's weight decay is (arXiv 1711.05101).


class ProximalPenalty(r.Rank1Penalty):
    """Rank-1 EWC outside the gradient.

    A strong penalty in the gradient enters Adam's second moment, and shortens every step.
    """

    def __call__(self, theta: Tensor) -> Tensor:
        return super().__call__(theta).detach()

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        """Move the weights theta to the z that minimizes penalty(z) + ||z - theta||^2 / (2 lr)."""
        if self.origin is None:
            return
        theta = r.flat(r.trainable(model))  # (D,)
        stiffness = lr * self.lam * self.c_star.cpu().double()  # (k,)
        system = torch.eye(len(stiffness)) + (self.mu @ self.mu.T).cpu().double() * stiffness
        drift = torch.linalg.solve(system, self.drift(theta).cpu().double())  # at z
        z = theta - (stiffness * drift).to(theta) @ self.mu
        vector_to_parameters(z, r.trainable(model))


# ---- F's top eigenvectors: F ~ sum_j lambda_j v_j v_j^T, the best approximation of its rank.

GRADIENTS = 1024  # at most this many per-sample gradients are kept at once


def gradients_kept(model: nn.Module) -> int:
    """How many per-sample gradients are kept: 1,024 of up to 390,000 weights, 10 of 37 million."""
    return min(GRADIENTS, r.GRADIENT_FLOATS // len(r.flat(r.trainable(model))))


def eigenpairs(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N,), largest first, and top k eigenvectors (k, D) of F = G^T G / N, G (N, D).

    From the Gram matrix G G^T / N, which has the same nonzero eigenvalues: no D x D matrix is made.
    """
    values, U = torch.linalg.eigh((G @ G.T).cpu().double() / len(G))
    values = values.flip(0).clamp(min=1e-30)
    U = U.flip(1)
    top = U[:, :k] / (len(G) * values[:k]).sqrt()  # v_j = G^T u_j / sqrt(N lambda_j)
    return values, top.T.to(G) @ G


def rank_k_fisher(model, x, y, n, generator, loss=r.per_sample_loss, k=1) -> tuple:
    """F's top eigenvectors v_j (k, D) and eigenvalues lambda_j (k,).

    F is that of n gradients, or of as many as can be kept. Every process computes all of them.
    ValueError: fewer than k gradients.
    """
    n = min(n, gradients_kept(model))
    if n < k:
        raise ValueError(f"rank {k} needs at least {k} gradients, not {n}")
    rows = []
    with r.eval_mode(model):
        for batch in r.fisher_batches(x, y, n, generator, loss):
            rows.append(r.per_sample_gradients(model, batch, loss))
            r.check_first_sample(model, batch, loss, rows[-1][0])
    values, vectors = eigenpairs(torch.cat(rows), k)
    return vectors, values[:k].to(vectors)


class RankKPenalty(r.Rank1Penalty):
    """(lam/2) sum_k sum_j lambda_kj (v_kj^T (theta - theta*_k))^2: rank-1 for each eigenvector."""

    def add(self, fisher: tuple[Tensor, Tensor], theta: Tensor) -> dict[str, float]:
        """-> the numbers of the top eigenpair, whose energy is lambda_1."""
        numbers = [super(RankKPenalty, self).add(pair, theta) for pair in zip(*fisher)]
        return numbers[0]


def isotropic_fisher(model, x, y, n, generator, loss=r.per_sample_loss) -> Tensor:
    """The multiple of the identity with F's trace: tr(F) / D for every weight, (D,)."""
    diagonal = r.diagonal_fisher(model, x, y, n, generator, loss)
    return diagonal.mean().expand_as(diagonal)


# ---- Another direction: the same network's mean gradient on images that show nothing.


def shuffled_fisher(model, x, y, n, generator, loss=r.per_sample_loss) -> tuple:
    """mu (D,) and c* of the images x with shuffled pixels, each image in its own order.

    c* is rescaled so that c* ||mu||^2 is that of the true images. Two numbers are also returned:
    the cosine of this mu and the true one, and c* ||mu||^2 before rescaling.
    """
    true_mu, true_c_star = r.rank1_fisher(model, x, y, n, generator, loss)
    order = torch.rand(len(x), 1, x[0, 0].numel(), generator=generator, device=x.device).argsort(2)
    shuffled = x.flatten(2).gather(2, order.expand(-1, x.shape[1], -1)).view_as(x)
    mu, c_star = r.rank1_fisher(model, shuffled, y, n, generator, loss)
    norm, true_norm = mu.norm(), true_mu.norm()
    numbers = {
        "cos_true_mu": float(mu @ true_mu / (norm * true_norm)),
        "own_energy": float(c_star * norm**2),
    }
    return mu, true_c_star * true_norm**2 / norm**2, numbers


class ShuffledPenalty(r.Rank1Penalty):
    """A rank-1 penalty that passes shuffled_fisher's numbers on to result.json."""

    def add(self, fisher: tuple, theta: Tensor) -> dict[str, float]:
        mu, c_star, numbers = fisher
        return super().add((mu, c_star), theta) | numbers


# ---- FashionMNIST at 16x16: real pictures that a laptop can learn.


def load_fashion16(data_dir: Path) -> r.Data:
    """Means of 2x2 pixels of the padded images; per class the first 1,000 to train, 200 to test."""
    x, y, test_x, test_y = r.load_torchvision("FashionMNIST", data_dir)

    def few(images, labels, n):
        chosen = torch.cat([torch.nonzero(labels == c)[:n, 0] for c in range(10)])
        means = nn.functional.avg_pool2d(images[chosen].float(), 2)
        return means.round().to(torch.uint8), labels[chosen]

    return r.Data(*few(x, y, 1000), *few(test_x, test_y, 200))


LOADERS = {"fashion16": (load_fashion16, r.LOADERS["fashion"][1])}
DATASETS = {"fashion16": r.DIGITS | {"tasks": 10, "class_order": "random", "epochs": 54}}
DATASETS["fashion16"] |= {"channels": [16, 32, 32]}


distilled = partial(r.Method, replay=True, distill=True)
METHODS = {
    "rank1-low": distilled(
        fisher=partial(r.rank1_fisher, loss=loss_in(0, 333)), penalty=r.Rank1Penalty
    ),
    "rank1-middle": distilled(
        fisher=partial(r.rank1_fisher, loss=loss_in(333, 667)), penalty=r.Rank1Penalty
    ),
    "rank1-high": distilled(
        fisher=partial(r.rank1_fisher, loss=loss_in(667, 1000)), penalty=r.Rank1Penalty
    ),
    "rank1-proximal": distilled(fisher=r.rank1_fisher, penalty=ProximalPenalty),
    "rank1-eig": distilled(fisher=partial(rank_k_fisher, k=1), penalty=RankKPenalty),
    "rank2": distilled(fisher=partial(rank_k_fisher, k=2), penalty=RankKPenalty),
    "rank4": distilled(fisher=partial(rank_k_fisher, k=4), penalty=RankKPenalty),
    "rank1-shuffled": distilled(fisher=shuffled_fisher, penalty=ShuffledPenalty),
    "isotropic": distilled(fisher=isotropic_fisher, penalty=r.DiagonalPenalty),
}


def add_rows() -> None:
    """Add the rows to the script's own, and this file's hash to the script's in result.json."""
    r.METHODS.update(METHODS)
    r.LOADERS.update(LOADERS)
    r.DATASETS.update(DATASETS)
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    r.SCRIPT = f"{r.SCRIPT} with beyond.py {own}"


if __name__ == "__main__":
    add_rows()
    r.program()
