"""The gradient noise on Gamma: the covariance of one step's gradient under a noise, and the resulting variance of w.

On Gamma, to first order in eta, grad_w Lhat(w, eta) = M eta with M = d^2 Lhat/(dw d eta) at eta = 0, so that

    Sigma = M diag(sigma^2) M^T                          one eta for the step, full batch
    Sigma = (1/(B N)) sum_n M_n diag(sigma^2) M_n^T      one eta for each of the B samples; M_n is that of sample n

With one eta for a step on a batch b, M is that of the batch, and Sigma is the mean over the batches (`batch_mean`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import vjp

from torch_singlim.geometry import relaxed_filter, samples_at_once
from torch_singlim.linalg import DenseFactored, Estimate, FactoredOperator, rademacher
from torch_singlim.network import ZeroLossProblem, jvp
from torch_singlim.noise import Covariance, NoiseSystem, noisy_outputs, parts
from torch_singlim.theory.directions import batched, directions_at_once, for_directions, mean_at
from torch_singlim.theory.fluctuations import (
    FEW_RESIDUALS,
    UnstableStepError,
    batch_mean,
    batch_weights,
    fluctuation_covariance,
)
from torch_singlim.theory.potential import chunk_gradient, of_chunk, random_direction
from torch_singlim.theory.sgd import SGDSettings, stationary_variance

_SAMPLES = 32  # draws of the gradient noise if its basis is too large: the variance is then accurate to about 25 %

__all__ = ["GradientNoise", "gradient_noise", "noise_factor", "noise_products", "of_hessian", "output_noise"]


def of_hessian(noise: NoiseSystem, problem: ZeroLossProblem, batch_size: int) -> float:
    """c where Sigma = c H for all noise together; 0 for any other noise, or none."""
    known = noise.covariance(problem, batch_size) or Covariance()
    return known.hessian if known.identity == 0 else 0.0


def noise_products(
    system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, etas: Iterable[tuple[Tensor, ...]]
) -> Tensor:
    """M eta = d/dt grad_w Lhat(w, t eta) at t = 0, the gradient noise of the full batch to first order  ``[k, P]``.

    Args:
        system: the noise.
        problem: loss and N samples.
        w: weights ``[P]``.
        etas: k draws, each with one eta for each part ``[N, D]`` or ``[D]``; as many at once as memory allows.
    """

    def one(chunk: slice, *eta: Tensor) -> Tensor:
        own = of_chunk(system, eta, chunk)

        def at(*etas: Tensor) -> Tensor:
            return chunk_gradient(system, problem, w, etas, chunk)

        zeros = tuple(map(torch.zeros_like, own))
        return jvp(at, zeros, own)[1]

    def products(stacked: tuple[Tensor, ...]) -> Tensor:
        return mean_at(problem, one, *stacked)

    rows = list(for_directions(etas, directions_at_once(problem), products))
    return torch.stack(rows) if rows else w.new_zeros(0, w.numel())


def noise_factor(part: NoiseSystem, problem: ZeroLossProblem, w: Tensor, *, batch_size: int) -> Tensor:
    """The dense F with Sigma = F^T F ``[k, P]``: one row for each component of eta (of each sample)."""
    scale, N = part.scale(problem), problem.num_samples
    if not part.per_sample:
        return noise_products(part, problem, w, ((s,) for s in torch.diag(scale)))

    def basis() -> Iterator[tuple[Tensor]]:
        for n in range(N):
            for s in torch.diag(scale):
                eta = scale.new_zeros(N, scale.numel())
                eta[n] = s
                yield (eta,)

    return noise_products(part, problem, w, basis()) * math.sqrt(N / batch_size)  # M_n s / N


def output_noise(part: NoiseSystem, problem: ZeroLossProblem, w: Tensor) -> Tensor:
    """G_n = R_n D_n diag(sigma^2) D_n^T R_n^T ``[N, rows, rows]``, D_n = df_n/d eta, for noise that moves the
    outputs of each sample.

    On Gamma the residual is zero, so that M_n = J_n^T A_n D_n and Sigma = B^T blockdiag(G_n) B / batch, if each sample
    has an eta of its own.
    """
    scale, f = part.scale(problem), problem.outputs(w)

    def transposed(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        def outputs(eta: Tensor) -> Tensor:
            return noisy_outputs(part, problem.function, w, x, y, eta)

        pullback = vjp(outputs, scale.new_zeros((len(x), scale.numel()) if part.per_sample else scale.shape))[1]
        return lambda u: pullback(u)[0]

    def factor(x: Tensor, y: Tensor, R: Tensor) -> Tensor:  # R_n D_n of n samples  [n, rows, D]
        return torch.stack([transposed(x, y)(row) for row in R.unbind(1)], 1)

    def alone(x: Tensor, y: Tensor, R: Tensor) -> Tensor:  # of one sample  [rows, D]
        return torch.stack([transposed(x[None], y[None])(row[None]) for row in R.unbind(0)])

    own, blocks = problem.process_group.shard(problem.num_samples), []
    # a vector [D] for each row is in memory
    size = (
        problem.batch_size
        if part.per_sample
        else samples_at_once(problem, problem.num_residuals // problem.num_samples)
    )
    for start in range(own.start, own.stop, size):
        chunk = slice(start, min(start + size, own.stop))
        samples = problem.inputs[chunk], problem.targets[chunk], problem.output_factor(f, chunk)
        RD = (factor(*samples) if part.per_sample else batched(alone, *samples)) * scale
        blocks.append(RD @ RD.mT)
    return problem.process_group.all_gather(torch.cat(blocks), problem.num_samples)


def shared_output_noise(part: NoiseSystem, problem: ZeroLossProblem, w: Tensor) -> Tensor:
    """G = R D diag(sigma^2) D^T R^T / N ``[M, M]``, for noise with one eta for all samples, which moves their outputs.

    On Gamma Sigma = B^T G B on the full batch.
    """
    scale, f = part.scale(problem), problem.outputs(w)
    N, M = problem.num_samples, problem.num_residuals
    loss, rows = problem.sample_loss, torch.eye(M, dtype=w.dtype, device=w.device)

    def outputs(eta: Tensor, chunk: slice) -> Tensor:
        return noisy_outputs(part, problem.function, w, problem.inputs[chunk], problem.targets[chunk], eta)

    def slope(chunk: slice, z: Tensor) -> Tensor:  # D^T R^T z, the mean over a chunk  [D]
        u = loss.unwhiten(f[chunk], problem.targets[chunk], z.view(N, -1)[chunk])
        return vjp(lambda eta: outputs(eta, chunk), torch.zeros_like(scale))[1](u)[0] / len(u)

    def images(slopes: Tensor) -> Tensor:  # R D g for g [k, D]  [k, M]
        def image(g: Tensor, chunk: slice) -> Tensor:
            along = jvp(lambda eta: outputs(eta, chunk), (torch.zeros_like(scale),), (g,))[1]
            return loss.whiten(f[chunk], problem.targets[chunk], along)

        found = [batched(lambda g, c=chunk: image(g, c), slopes).movedim(1, 0) for chunk in problem.chunks()]
        whole = problem.process_group.all_gather(torch.cat(found), N)  # [N, k, rows]
        return whole.movedim(1, 0).reshape(len(slopes), M)

    def products(z: tuple[Tensor, ...]) -> Tensor:
        return images(scale.square() * mean_at(problem, slope, *z))

    return torch.stack(list(for_directions(((z,) for z in rows), directions_at_once(problem), products)))


@dataclass(frozen=True)
class GradientNoise:
    """Sigma at a point of Gamma, as a sum of terms in closed form and of a sampled term.

        Sigma = c_H H + c_I I + B^T blockdiag(G) B + mean_k g_k g_k^T

    Args:
        num_samples: N.
        closed: c_H and c_I.
        gram: G ``[N, rows, rows]``, one block for each sample, or ``[1, M, M]`` for all of them; None: zero.
        draws: g ``[k, P]``; None: no sampled term.
        exact: whether the draws are a basis, so that their mean is exact.
        transient: variance per direction of the transient perturbation, which is added to that from Sigma.
    """

    num_samples: int
    closed: Covariance
    gram: Tensor | None = field(default=None, repr=False)
    draws: Tensor | None = field(default=None, repr=False)
    exact: bool = True
    transient: float = 0.0

    def diffusion(self, hessian: FactoredOperator, *, num_weights: int) -> float:
        """Mean variance of the gradient noise in a tangent direction, tr(P_T Sigma)/dim T: of c_I and the draws."""
        if self.draws is None:
            return self.closed.identity
        tangential = torch.stack([hessian.project_kernel(g) for g in self.draws]).square().sum(1).mean().item()
        return self.closed.identity + tangential / max(num_weights - hessian.rank, 1)

    def normal_variance(
        self,
        hessian: FactoredOperator,
        sgd: SGDSettings,
        *,
        level: float = 0.0,
        random_batches: bool = False,
        num_draws: int = 16,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """Trace of the stationary covariance normal to Gamma, over the modes that are relaxed at a level.

            H X + X H - alpha H X H = alpha Sigma   =>   tr f X f = sum_i f(l_i)^2 chi(l_i) Sigma_ii
            chi = alpha / (2 l - alpha l^2),      f: `relaxed_filter`

        With momentum, chi is that of the whole recursion, see `stationary_variance`. Infinite if a mode is unstable.
        With `random_batches`, X is that of `fluctuation_covariance` under batches smaller than the data, whose Hessians
        are random: for noise whose Sigma is exact, if there is no momentum and it takes seconds. Elsewhere this is
        neglected.
        """
        stiffest, noisy = (
            hessian.largest,
            self.gram is not None or self.draws is not None or self.closed != Covariance(),
        )
        unstable = stationary_variance(sgd, torch.tensor([stiffest], dtype=torch.float64)).isinf().item()
        if noisy and unstable and stiffest >= level:
            return Estimate(math.inf, 0.0)

        def kept(values: Tensor) -> Tensor:
            return relaxed_filter(values, level).square()

        if noisy and random_batches and self._knows_batches(hessian, sgd):
            assert isinstance(hessian, DenseFactored)
            values = hessian.eigenvalues
            try:
                Y = fluctuation_covariance(hessian, self.source(hessian), sgd, num_samples=self.num_samples)
            except UnstableStepError:
                return Estimate(math.inf, 0.0)
            return Estimate((kept(values) * values * Y.diagonal()).sum().item(), 0.0)

        def chi(values: Tensor) -> Tensor:
            share = kept(values)
            return torch.where(share > 0, share * stationary_variance(sgd, values), 0.0) if noisy else 0 * values

        def closed(values: Tensor) -> Tensor:  # c_H H + c_I I and the transient part, mode by mode
            return chi(values) * (self.closed.hessian * values + self.closed.identity) + self.transient * kept(values)

        total = self._trace(hessian, closed, chi, num_draws=num_draws, generator=generator)
        if self.draws is None:
            return total
        terms = torch.stack([torch.dot(g, hessian.normal_function(chi, g)) for g in self.draws])
        return total + (Estimate(terms.mean().item(), 0.0) if self.exact else Estimate.from_draws(terms))

    def _knows_batches(self, hessian: FactoredOperator, sgd: SGDSettings) -> bool:
        """Whether batches are smaller than the data, and their part in the fluctuations is known."""
        few = isinstance(hessian, DenseFactored) and hessian.operator.shape[0] <= FEW_RESIDUALS
        batches = sgd.batch(self.num_samples) < self.num_samples and not sgd.momentum
        return few and batches and self.exact

    def source(self, hessian: DenseFactored) -> Tensor:
        """S ``[M, M]`` of the normal part of Sigma = B^T S B, without c_I."""
        U, values = hessian.eigenvectors, hessian.eigenvalues
        source = self.closed.hessian * torch.eye(len(U), dtype=U.dtype, device=U.device)
        if self.gram is not None:
            source = source + torch.block_diag(*self.gram)
        if self.draws is not None:
            y = torch.stack([hessian.operator.matvec(g) for g in self.draws]) @ (U / values) @ U.T
            source = source + y.T @ y / len(y)
        return source

    def _trace(self, hessian: FactoredOperator, closed, chi, *, num_draws, generator) -> Estimate:
        """sum_i closed(l_i) + chi(l_i) l_i u_i^T blockdiag(G) u_i: exact with eigenvectors of K, else Hutchinson's."""
        total = hessian.trace(closed)
        if self.gram is None:
            return total
        if isinstance(hessian, DenseFactored):
            U, values = hessian.eigenvectors.reshape(*self.gram.shape[:2], -1), hessian.eigenvalues
            form = torch.einsum("nar,nar,r->", U, self.gram @ U, chi(values) * values).item()
            return total + Estimate(form, 0.0)
        eigenvalues, vectors = torch.linalg.eigh(self.gram)
        root = vectors * eigenvalues.clamp_min(0).sqrt()[:, None, :]
        forms = []
        for _ in range(num_draws):
            z = rademacher((hessian.operator.shape[0],), generator=generator, like=root)
            z = (root @ z.reshape(*root.shape[:2], 1)).reshape(-1)  # Cov(root z) = G
            forms.append(hessian.gram_form(lambda values: chi(values) * values, z))
        return total + Estimate.from_draws(torch.tensor(forms))


def gradient_noise(
    system: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    batch_size: int,
    num_draws: int = 16,
    generator: torch.Generator | None = None,
) -> GradientNoise:
    """Sigma of a system at w ``[P]``, which is assumed to be on Gamma.

    Sigma has a closed form for the systems of order 2, is computed from the outputs for noise on activations, inputs
    and, up to 500 residuals, weights, and is sampled by draws of M eta for the other systems (by a basis if `num_draws`
    suffices for one).

    Args:
        system: the noise.
        problem: loss and samples.
        w: weights ``[P]``.
        batch_size: samples per step.
        num_draws: number of directions for the sampled systems: a basis if that suffices, else at most 32 random ones.
        generator: of the random directions.
    """
    N, B = problem.num_samples, batch_size
    closed, grams, draws, exact, transient = Covariance(), [], [], True, 0.0
    for part in parts(system):
        scale = part.scale(problem)
        known = part.covariance(problem, batch_size)
        if part.transient:
            transient += scale.square().mean().item()
        if known is not None:
            closed = closed + known
        elif scale.numel() == 0:
            continue
        elif part.moves_outputs and part.per_sample:
            grams.append(output_noise(part, problem, w) / B)
        elif part.moves_outputs and problem.num_residuals <= FEW_RESIDUALS:
            grams.append(batch_mean(shared_output_noise(part, problem, w), num_samples=N, batch_size=B)[None])
        else:
            own, sampled = _sampled(part, problem, w, B, num_draws=num_draws, generator=generator)
            exact = exact and not sampled
            if B < N and not part.per_sample:  # one eta for the samples of a batch
                a, d = batch_weights(N, B)
                own = math.sqrt(a) * own
                if part.moves_outputs:
                    grams.append(d / N * output_noise(part, problem, w))
                else:
                    single, sampled = _of_single_samples(part, problem, w, num_draws=num_draws, generator=generator)
                    draws.append(math.sqrt(d) * single)
                    exact = exact and not sampled
            draws.append(own)
    if len({len(each) for each in grams}) > 1:  # blocks of single samples beside one of all
        grams = [torch.block_diag(*each)[None] for each in grams]
    gram = torch.stack(grams).sum(0) if grams else None
    # the draws of all sampled parts are concatenated, with weights such that the common mean is the sum of their means
    count = sum(map(len, draws))
    joined = torch.cat([g * math.sqrt(count / len(g)) for g in draws]) if draws else None
    return GradientNoise(N, closed, gram, joined, exact, transient)


def _of_single_samples(
    part: NoiseSystem, problem: ZeroLossProblem, w: Tensor, *, num_draws: int, generator: torch.Generator | None
) -> tuple[Tensor, bool]:
    """g ``[k, P]`` with the mean g g^T = (1/N^2) sum_n M_n diag(sigma^2) M_n^T, and whether they are random draws.

    For noise with one eta for all samples.
    """
    N, D = problem.num_samples, part.scale(problem).numel()
    if num_draws >= N * D:
        each = [noise_factor(part, problem.samples(slice(n, n + 1)), w, batch_size=1) for n in range(N)]
        return torch.cat(each) * math.sqrt(D / N), False
    device = "cpu" if generator is None else generator.device
    chosen = torch.randint(N, (min(num_draws, _SAMPLES),), generator=generator, device=device).tolist()
    rows = []
    for n in chosen:
        alone = problem.samples(slice(n, n + 1))
        rows.append(noise_products(part, alone, w, [random_direction(part, alone, generator=generator)]))
    return torch.cat(rows) / math.sqrt(N), True


def _sampled(
    part: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    batch_size: int,
    *,
    num_draws: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, bool]:
    """g ``[k, P]`` whose mean g g^T is Sigma, and whether they are random draws, not a basis."""
    scale, N = part.scale(problem), problem.num_samples
    if scale.numel() * (N if part.per_sample else 1) <= num_draws:
        factor = noise_factor(part, problem, w, batch_size=batch_size)
        return factor * math.sqrt(len(factor)), False
    size = math.sqrt(N / batch_size) if part.per_sample else 1.0
    count = min(num_draws, _SAMPLES)
    signs = (random_direction(part, problem, generator=generator) for _ in range(count))
    return size * noise_products(part, problem, w, signs), True
