"""Cross-entropy at many positions, beside torch's own with ignore_index."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_singlim import ZeroLossProblem, linearize, nearest_point
from torch_singlim.network import SequenceCrossEntropy

DTYPE, N, T, V = torch.float64, 3, 5, 4


def labels(count=2, shape=(T,)):
    """Labels of N samples, with so many positions that are ignored in each."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(V, (N, T), generator=generator)
    for row in y:
        row[torch.randperm(T, generator=generator)[:count]] = -100
    return y.view(N, *shape)


class Net(nn.Module):
    """Outputs at every position, with the classes last or first."""

    def __init__(self, first, shape=(T,)):
        super().__init__()
        self.body, self.first, self.shape = (
            nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, T * V)),
            first,
            shape,
        )

    def forward(self, x):
        f = self.body(x)
        return f.view(len(x), V, *self.shape) if self.first else f.view(len(x), *self.shape, V)


def torch_loss(f, y, smoothing, first):
    """[n, T V] -> torch's mean over the positions."""
    f = f.view(len(f), V, -1) if first else f.view(len(f), -1, V).transpose(1, 2)
    return F.cross_entropy(f, y.flatten(1), label_smoothing=smoothing)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_is_the_loss_of_torch_and_its_derivatives(first, smoothing):
    y = labels()
    loss = SequenceCrossEntropy.of(y, V, smoothing, classes_first=first)
    generator = torch.Generator().manual_seed(1)
    f, v = torch.randn(2, N, T * V, generator=generator, dtype=DTYPE)
    q = loss.prepare(y, f)
    mean = (loss.value(f, q) + loss.infimum(q)).mean()
    torch.testing.assert_close(mean, torch_loss(f, y, smoothing, first))
    assert loss.num_rows(T * V) == (T - 2) * (V - 1)
    assert loss.attained(f, q) == (smoothing > 0)
    g = torch.func.grad(lambda f: N * torch_loss(f, y, smoothing, first))(f)
    torch.testing.assert_close(loss.unwhiten(f, q, loss.newton(f, q)), g)
    A = torch.func.hessian(lambda f: N * torch_loss(f, y, smoothing, first))(f)  # blocks of samples
    A = torch.stack([A[n, :, n] for n in range(N)])
    torch.testing.assert_close(loss.curvature(f, q, v), torch.einsum("ni,nij,nj->n", v, A, v))
    torch.testing.assert_close(loss.unwhiten(f, q, loss.whiten(f, q, v)), torch.einsum("nij,nj->ni", A, v))
    u = torch.randn(N, loss.num_rows(T * V), generator=generator, dtype=DTYPE)
    torch.testing.assert_close((loss.whiten(f, q, v) * u).sum(), (loss.unwhiten(f, q, u) * v).sum())


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(T,), (T, 1)])
def test_a_problem_with_it(first, shape):
    torch.manual_seed(0)
    y, x = labels(shape=shape), torch.randn(N, 6)
    loss = SequenceCrossEntropy.of(y, V, 0.2, classes_first=first)
    problem = ZeroLossProblem(Net(first, shape), loss, x, y)
    w = problem.weights()
    expected = torch_loss(problem.outputs(w), y, 0.2, first)
    assert problem.loss(w).item() + problem.infimum() == pytest.approx(expected.item())
    at = linearize(problem, w)
    torch.testing.assert_close(at.operator.rmatvec(at.newton()), problem.gradient(w))
    assert at.residual.shape == (problem.num_residuals,) == (N * 9,)
    nearest = nearest_point(problem, w, max_steps=60)
    assert nearest.converged
    assert problem.loss(nearest.point).item() < 1e-8
    part = problem.on(x[:2], y[:2])
    assert part.loss(w).item() + part.infimum() == pytest.approx(torch_loss(part.outputs(w), y[:2], 0.2, first).item())


def test_what_does_not_fit_is_refused():
    y = labels()
    y[0] = -100
    y[0, 1] = 2
    with pytest.raises(ValueError, match=r"positions to be predicted are \d to \d in a sample: .* equally many"):
        SequenceCrossEntropy.of(y, V)
    loss, f = SequenceCrossEntropy(V, 3), torch.zeros(N, T * V)
    with pytest.raises(ValueError, match="each sample must have 3 positions"):
        loss.prepare(labels(1), f)
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(3, 5\) for 21 outputs and 4 classes"):
        loss.prepare(labels(), torch.zeros(N, 21))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.2, got 0\.\.3"):
        SequenceCrossEntropy(3, 3).prepare(labels(), torch.zeros(N, T * 3))
