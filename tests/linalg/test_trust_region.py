"""The truncated conjugate gradients in a ball against the exact minimiser of the quadratic."""

import pytest
import torch

from torch_singlim.linalg import trust_region_step


def quadratic(values):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T, Q.sum(1)


def test_inside_the_ball_it_is_newtons_step():
    W, g = quadratic([3.0, 1.0, 0.5, 0.2])
    step = trust_region_step(lambda v: W @ v, g, 100.0, rtol=1e-12)
    truth = -torch.linalg.solve(W, g)
    torch.testing.assert_close(step.x, truth)
    assert step.inside
    assert not step.negative
    assert step.decrease == pytest.approx(-torch.dot(g, truth).item() / 2)
    assert step.reach_decrease == step.decrease


@pytest.mark.parametrize("values", [[3.0, 1.0, 0.5, 0.2], [3.0, 1.0, 0.5, -0.2]])
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0])
def test_the_boundary_and_a_larger_ball(values, radius):
    W, g = quadratic(values)
    step = trust_region_step(lambda v: W @ v, g, radius, reach=2 * radius, rtol=1e-12)
    assert step.x.norm().item() == pytest.approx(radius)
    assert not step.inside
    value = torch.dot(g, step.x) + torch.dot(step.x, W @ step.x) / 2
    assert step.decrease == pytest.approx(-value.item())
    assert step.decrease >= g.norm().item() * min(radius, g.norm().item() / 3) / 2  # Cauchy's point
    larger = trust_region_step(lambda v: W @ v, g, 2 * radius, rtol=1e-12)
    assert step.reach_decrease == pytest.approx(larger.decrease)


def test_nothing_to_do():
    step = trust_region_step(lambda v: v, torch.zeros(3), 1.0)
    assert (step.decrease, step.inside, step.steps) == (0.0, True, 0)
