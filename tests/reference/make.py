"""Where the reference values come from: computed in float64 by dense brute force; this script computes them again.

Nothing of the package is used, and no shortcut is taken: full Jacobians, full Hessians and third derivatives from
plain torch.autograd, eigendecompositions of the whole Hessian, Newton's method on the Lagrangian for the nearest point.
The data, the starting weights and the settings are those in the files.

    python tests/reference/make.py [case ...]        prints, for each value, the largest difference from the stored one

With the noisy loss Lhat(w, xi), xi of unit covariance, at the nearest point (arXiv 2404.12293, 2110.06914):

    H = D^2 L,   P_T = projection on ker H
    V_1 = (1/2) tr D_xi^2 Lhat              order 1 where P_T grad V_1 does not vanish: drift -alpha P_T grad V_1
    M = D_w D_xi Lhat,   Sigma = M M^T      (one xi for each sample: times N/B)
    order 2 where P_T grad V_1 = 0, Sigma does not: drift alpha^2 (1/2) D^2 Phi[Sigma]
    V_2 = (c/4) tr H for Sigma = c H,   V_2 = (c/4) log pdet H for Sigma = c I
    H X + X H - alpha H X H = alpha Sigma   normal variance tr X
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev
from torch.nn import functional as F

FOLDER = Path(__file__).parent
CASES = ["tanh_scalar", "gelu_vector", "tanh_smoothed_ce"]
KINDS = ["dropout", "drop_connect", "anti_correlated", "input_noise", "label_noise", "langevin", "minibatch"]
ACTIVATIONS = {"tanh": torch.tanh, "gelu": F.gelu}


class Case:
    """Network, loss and data of one file, as functions of the flat weights ``[P]``."""

    def __init__(self, name: str) -> None:
        self.stored = json.loads((FOLDER / f"{name}.json").read_text())
        self.spec = self.stored["spec"]
        self.x, self.y, self.start = (self._tensor(key) for key in ("inputs", "targets", "weights"))
        self.widths = self.spec["sizes"][1:-1]

    def _tensor(self, key: str) -> Tensor:
        return torch.tensor(self.stored[key], dtype=torch.float64)

    def outputs(self, w: Tensor, x: Tensor | None = None, eta: Tensor | None = None) -> Tensor:
        """f ``[N, C]``; the hidden activations times 1 + eta ``[N, D]``."""
        h, used = self.x if x is None else x, 0
        layers: list[list[Tensor]] = []
        for name, shape in zip(self.stored["parameter_names"], self.stored["parameter_shapes"], strict=True):
            size = math.prod(shape)
            if name.endswith("weight"):
                layers.append([])
            layers[-1].append(w[used : used + size].view(shape))
            used += size
        masks = [None] * len(layers) if eta is None else [*eta.split(self.widths, dim=1), None]
        for i, (parameters, mask) in enumerate(zip(layers, masks, strict=True)):
            h = F.linear(h, *parameters)
            if i + 1 < len(layers):
                h = ACTIVATIONS[self.spec["activation"]](h)
            if mask is not None:
                h = h * (1 + mask)
        return h

    def loss(self, w: Tensor, x: Tensor | None = None, eta: Tensor | None = None, shift: Tensor | float = 0) -> Tensor:
        """Mean over samples, its infimum subtracted; `shift` is added to the targets."""
        f = self.outputs(w, x, eta)
        if self.spec["loss"] == "mse":
            return ((f - self.y - shift) ** 2).mean()
        infimum = -(self.y * self.y.log()).sum(1).mean()
        return -((self.y + shift) * f.log_softmax(1)).sum(1).mean() - infimum

    def constraints(self, w: Tensor) -> Tensor:
        """Zero exactly on Gamma  ``[M]``: outputs minus targets, or differences of the logits minus those of log q."""
        f = self.outputs(w)
        if self.spec["loss"] == "mse":
            return (f - self.y).reshape(-1)
        off = f - self.y.log()
        return (off[:, :-1] - off[:, -1:]).reshape(-1)

    def noisy(self, kind: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Lhat(w, xi) and xi = 0: a row for each sample ``[N, D]``, or one vector for the step."""
        spec, N, sigma = self.spec, len(self.x), self.spec["sigma"]

        def rows(size: int) -> Tensor:
            return torch.zeros(N, size, dtype=torch.float64)

        if kind == "dropout":
            each = zip(self.widths, spec["dropout"], strict=True)
            rates = torch.cat([torch.full((n,), p, dtype=torch.float64) for n, p in each])
            spread = (rates / (1 - rates)).sqrt()
            return lambda w, xi: self.loss(w, eta=spread * xi), rows(len(spread))
        if kind == "drop_connect":
            return lambda w, xi: self.loss(w * (1 + sigma * xi)), torch.zeros_like(self.start)
        if kind == "anti_correlated":
            return lambda w, xi: self.loss(w + sigma * xi), torch.zeros_like(self.start)
        if kind == "input_noise":
            return lambda w, xi: self.loss(w, x=self.x + sigma * xi), rows(self.x.shape[1])
        if kind == "langevin":
            return lambda w, xi: self.loss(w) + sigma * torch.dot(w, xi), torch.zeros_like(self.start)
        if kind == "minibatch":
            return lambda w, xi: self.loss(w), rows(0)
        if spec["loss"] == "mse":
            return lambda w, xi: self.loss(w, shift=sigma * xi), rows(self.y.shape[1])
        # a label drawn from the smoothed targets q has the covariance diag(q) - q q^T
        values, vectors = torch.linalg.eigh(torch.diag_embed(self.y) - self.y[:, :, None] * self.y[:, None, :])
        root = vectors * values.clamp_min(0).sqrt()[:, None, :]
        return lambda w, xi: self.loss(w, shift=torch.einsum("ncd,nd->nc", root, xi)), rows(self.y.shape[1])


def nearest_point(case: Case) -> Tensor:
    """Newton's method for  v - w + Dc(v)^T lambda = 0,  c(v) = 0."""
    w, v = case.start, case.start
    multipliers = torch.zeros_like(case.constraints(w))
    P, M = len(w), len(multipliers)
    for _ in range(50):
        J = jacrev(case.constraints)(v)
        bend = hessian(lambda u, m=multipliers: torch.dot(m, case.constraints(u)))(v)
        top = torch.cat([torch.eye(P, dtype=w.dtype) + bend, J.T], 1)
        system = torch.cat([top, torch.cat([J, w.new_zeros(M, M)], 1)])
        rhs = -torch.cat([v - w + J.T @ multipliers, case.constraints(v)])
        step = torch.linalg.solve(system, rhs)
        v, multipliers = v + step[:P], multipliers + step[P:]
        if step[:P].norm() < 1e-14 * v.norm():
            return v
    raise RuntimeError("Newton's method did not converge")


def linearised_distance(case: Case) -> float:
    """|B^+ b| of the quadratic model at the starting weights: minimise (f - f*)^T A (f - f*), f linearised."""
    f, J = case.outputs(case.start), jacrev(case.outputs)(case.start)
    if case.spec["loss"] == "mse":
        optimum, A = case.y, 2 / f.shape[1] * torch.eye(f.shape[1], dtype=f.dtype).expand(len(f), -1, -1)
    else:
        p = f.softmax(1)
        optimum, A = case.y.log(), torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(A)
    root = vectors @ torch.diag_embed(values.clamp_min(0).sqrt()) @ vectors.mT
    B, b = (root @ J).flatten(0, 1), (root @ (f - optimum)[:, :, None]).flatten()
    return (torch.linalg.pinv(B, rtol=1e-7) @ b).norm().item()


def ito_drift(T: Tensor, values: Tensor, Q: Tensor, Sigma: Tensor) -> Tensor:
    """(1/2) D^2 Phi[Sigma] on the kernel of H, from D^3 L ``[P, P, P]`` in the eigenbasis Q of H (arXiv 2110.06914)."""
    T, S = torch.einsum("abc,ai,bj,ck->ijk", T, Q, Q, Q), Q.T @ Sigma @ Q
    sums = values[:, None] + values
    X = torch.where(sums > 0, S / sums.where(sums > 0, 1.0), 0.0)
    return -0.5 * Q @ torch.where(values == 0, (T * X).sum((1, 2)), 0.0)


def system(case: Case, kind: str, point: Tensor) -> dict:
    """Order, potential, drift, mean offset, normal variance and distance of one noise."""
    alpha, batch, (noisy, zero) = case.spec["lr"], case.spec["batch"], case.noisy(kind)
    H = hessian(case.loss)(point)
    values, Q = torch.linalg.eigh(H)
    values = torch.where(values > 1e-9 * values[-1], values, 0.0)
    tangent, normal = Q[:, values == 0], Q[:, values > 0]
    kept = values[values > 0]

    def laplacian(w: Tensor) -> Tensor:
        D = zero.numel()
        return 0.5 * hessian(lambda xi: noisy(w, xi))(zero).reshape(D, D).diagonal().sum()

    M = jacfwd(lambda xi: grad(noisy)(point, xi))(zero).reshape(len(point), -1)
    Sigma = M @ M.T * (len(case.x) / batch if zero.ndim == 2 else 1.0)
    slope = grad(laplacian)(point) if zero.numel() else torch.zeros_like(point)
    along = tangent @ (tangent.T @ slope)
    offset = 0.0
    if along.norm() > 1e-8 * slope.norm() > 0:
        order, V, drift = 1, laplacian(point), -alpha * along
        offset = ((normal.T @ slope) / kept).norm().item()
    elif Sigma.norm() > 0:
        order = 2
        drift = alpha**2 * ito_drift(jacfwd(hessian(case.loss))(point), values, Q, Sigma)
        c = (tangent.T @ Sigma @ tangent).trace() / tangent.shape[1]  # Sigma = c I; 0 where Sigma = c H
        V = c / 4 * kept.log().sum() if c > 1e-9 * Sigma.norm() else Sigma.trace() / 4
    else:
        order, V, drift = None, torch.zeros(()), torch.zeros_like(point)
    variance = (alpha * (normal.T @ Sigma @ normal).diagonal() / (2 * kept - alpha * kept**2)).sum().item()
    return {
        "order": order,
        "potential": V.item(),
        "drift_per_step": drift.tolist(),
        "drift_norm": drift.norm().item(),
        "mean_offset_norm": offset,
        "normal_variance": variance,
        "rms_distance": math.sqrt(offset**2 + variance),
    }


def geometry(case: Case) -> dict:
    """Loss, distances, nearest point, rank and spectrum."""
    point = nearest_point(case)
    spectrum = torch.linalg.eigvalsh(hessian(case.loss)(point))
    spectrum = spectrum[spectrum > 1e-9 * spectrum[-1]]
    return {
        "loss": case.loss(case.start).item(),
        "linearised_distance": linearised_distance(case),
        "nearest_distance": (point - case.start).norm().item(),
        "nearest_point": point.tolist(),
        "rank": len(spectrum),
        "num_parameters": len(point),
        "nonzero_eigenvalues_at_nearest": spectrum.tolist(),
    }


def difference(found: float | list[float] | None, stored: float | list[float] | None) -> float:
    """The largest difference, relative to the largest stored number."""
    if found is None or stored is None:
        return 0.0 if found is stored else math.inf
    a, b = (torch.tensor(value, dtype=torch.float64) for value in (found, stored))
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def compare(name: str) -> dict[str, float]:
    """Every stored value of a case -> its difference from what is computed here."""
    case = Case(name)
    found = geometry(case)
    differences = {key: difference(value, case.stored[key]) for key, value in found.items()}
    point = torch.tensor(found["nearest_point"], dtype=torch.float64)
    for kind in KINDS:
        stored = case.stored["noise"][kind]
        values = system(case, kind, point)
        differences |= {f"{kind}: {key}": difference(values[key], stored[key]) for key in stored}
    return differences


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(name)
        for key, value in compare(name).items():
            print(f"  {key:40} {value:.1e}")
