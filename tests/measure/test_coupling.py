"""Statistics of coupled paths: on displacements made to order, whose truth is known."""

import math

import pytest
import torch

from torch_singlim.measure import compare
from torch_singlim.measure.coupling import CoupledWindow, noise_ceiling_of, pooled

P = 400


def draw(generator, *, speed, ratio, wobble, error, replicas):
    """A window whose mean run is the baseline and `ratio` times the induced drift of the averaged path.

    Args:
        speed: of everything, over the averaged path.
        ratio: of the noise-induced part.
        wobble: fluctuation of run and replicas, relative to the whole drift.
        error: sampling error of each averaged half, likewise.
        replicas: how many.
    """

    def noise(size):
        v = torch.randn(P, generator=generator, dtype=torch.float64)
        return size * v / math.sqrt(P)

    baseline, induced = torch.zeros(P, dtype=torch.float64), torch.zeros(P, dtype=torch.float64)
    baseline[0], induced[1] = 0.6, 0.8
    mean = speed * (baseline + induced) if ratio is None else baseline + ratio * induced
    a1, a2 = (baseline + induced + noise(error) for _ in range(2))
    return CoupledWindow.of(
        mean + noise(wobble), a1, a2, baseline=baseline, replicas=[mean + noise(wobble) for _ in range(replicas)]
    )


def windows(count, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return [draw(generator, **options) for _ in range(count)]


@pytest.mark.parametrize("error", [0.05, 0.3, 0.8])
def test_cross_products_take_the_sampling_error_out(error):
    """Where |a - mean a| is as large as the drift itself, the plain ratio would be half of the truth."""
    found = windows(400, 0, speed=0.9, ratio=None, wobble=0.3, error=error, replicas=1)
    assert pooled([w.speed for w in found]).mean == pytest.approx(0.9, abs=0.02)
    plain = torch.tensor([w.gram[0, 2] / w.gram[2, 2] for w in found]).mean().item()
    assert plain == pytest.approx(0.9 / (1 + error**2), rel=0.05)
    # cosine of the mean path with one run: |mean| / sqrt(|mean|^2 + wobble^2)
    cosines = torch.tensor([w.speed.cosine for w in found])
    assert cosines.mean().item() == pytest.approx(0.9 / math.hypot(0.9, 0.3), abs=0.02)


def test_the_noise_induced_part_alone():
    found = windows(400, 1, speed=None, ratio=0.7, wobble=0.2, error=0.3, replicas=1)
    assert pooled([w.noise for w in found]).mean == pytest.approx(0.7, abs=0.02)
    assert CoupledWindow.of(torch.ones(3), torch.ones(3), torch.ones(3)).noise is None


def test_replicas_have_the_ratio_that_the_run_would_have_in_their_place():
    generator = torch.Generator().manual_seed(3)
    run, n, a1, a2, *replicas = torch.randn(7, P, generator=generator, dtype=torch.float64) + 1
    (one,) = replicas[:1]
    found = CoupledWindow.of(run, a1, a2, baseline=n, replicas=[one]).noise_of_replicas
    exchanged = CoupledWindow.of(one, a1, a2, baseline=n, replicas=[run]).noise
    assert (found.product, found.stderr) == (pytest.approx(exchanged.product), pytest.approx(exchanged.stderr))
    several = CoupledWindow.of(run, a1, a2, baseline=n, replicas=replicas).noise_of_replicas
    y = (a1 + a2) / 2 - n
    each = [torch.dot(r - n, y).item() for r in replicas]
    assert several.ratio.mean == pytest.approx(sum(each) / 3 / torch.dot(a1 - n, a2 - n).item())
    assert CoupledWindow.of(run, a1, a2, baseline=n).noise_of_replicas is None
    assert CoupledWindow.of(run, a1, a2, replicas=[one]).noise_of_replicas is None


@pytest.mark.parametrize("ratio", [0.7, 1.0])
def test_a_run_that_differs_from_its_replicas(ratio):
    """Feedback of fluctuations is in both, what only the run does in one of them."""
    generator, projections = torch.Generator().manual_seed(4), []
    for _ in range(400):
        drawn = draw(generator, speed=None, ratio=ratio, wobble=0.2, error=0.3, replicas=2)
        projections.append(drawn.noise_of_replicas)
    assert pooled(projections).mean == pytest.approx(ratio, abs=0.02)
    spread = torch.tensor([p.ratio.mean for p in projections]).std().item()
    typical = torch.tensor([p.stderr for p in projections]).square().mean().sqrt().item()
    assert 0.8 <= typical / spread <= 1.5


def test_the_ceiling_is_what_the_mean_run_reaches():
    found = windows(300, 2, speed=1.0, ratio=None, wobble=0.5, error=0.05, replicas=2)
    ceiling = noise_ceiling_of([c for w in found for c in w.cosines(relative=False)])
    reached = torch.tensor([w.speed.cosine for w in found]).mean().item()
    assert ceiling == pytest.approx(1 / math.hypot(1.0, 0.5), abs=0.01)
    assert reached == pytest.approx(ceiling, abs=0.01)
    assert math.isnan(noise_ceiling_of([]))


@pytest.mark.parametrize(("replicas", "low"), [(1, 0.6), (3, 0.8)])
def test_errors_within_a_window_cover(replicas, low):
    """From one replica the scatter has a single degree of freedom: Student's t covers .71 within two errors."""
    found = windows(600, 3, speed=1.0, ratio=None, wobble=0.4, error=0.2, replicas=replicas)
    ratios = [w.speed.ratio for w in found]
    covered = sum(abs(r.mean - 1) <= 2 * r.stderr for r in ratios) / len(ratios)
    assert low <= covered <= 0.99
    cosines = [w.speed.cosine for w in found]
    mean = sum(cosines) / len(cosines)
    covered = sum(abs(w.speed.cosine - mean) <= 2 * w.speed.cosine_stderr for w in found) / len(found)
    assert low <= covered <= 0.99


@pytest.mark.parametrize(("wobble", "error"), [(0.4, 0.2), (0.4, 0.8), (3.0, 0.3)])
def test_the_error_of_the_cosine_is_the_scatter_of_repetitions(wobble, error):
    """Whether the run fluctuates little, so that its length fluctuates as much as the product, or more than it moves."""
    found = [w.speed for w in windows(300, 6, speed=1.0, ratio=None, wobble=wobble, error=error, replicas=2)]
    cosines, stated = (torch.tensor([getattr(p, name) for p in found]) for name in ("cosine", "cosine_stderr"))
    assert stated.square().mean().sqrt().item() == pytest.approx(cosines.std().item(), rel=0.2)


def test_errors_pooled_over_windows_cover():
    runs = [windows(12, 100 + seed, speed=0.95, ratio=None, wobble=0.5, error=0.3, replicas=1) for seed in range(150)]
    estimates = [pooled([w.speed for w in run]) for run in runs]
    covered = sum(abs(e.mean - 0.95) <= 1.96 * e.stderr for e in estimates) / len(estimates)
    assert 0.88 <= covered <= 0.99


def test_halves_that_disagree_are_said_to_tell_too_little():
    generator = torch.Generator().manual_seed(4)
    y, d = torch.randn(2, P, generator=generator, dtype=torch.float64)
    d = 0.9 * y + 0.1 * d  # one half is long, the other short
    assert not CoupledWindow.of(y, y + d, y - d).speed.resolved
    assert CoupledWindow.of(y, 1.01 * y, y).speed.resolved
    alone = CoupledWindow.of(y, y, y).speed  # no replica
    assert math.isnan(alone.stderr)
    assert math.isnan(alone.cosine_stderr)


def test_against_the_formulas_written_out():
    generator = torch.Generator().manual_seed(5)
    m, n, a1, a2, r1, r2 = torch.randn(6, P, generator=generator, dtype=torch.float64) + 1
    window = CoupledWindow.of(m, a1, a2, baseline=n, replicas=[r1, r2])
    x, y1, y2 = m - n, a1 - n, a2 - n
    y, d, D = (y1 + y2) / 2, (y1 - y2) / 2, y1 @ y2
    Q = x @ y / D
    t = torch.stack([x @ y, (r1 - n) @ y, (r2 - n) @ y])
    s2 = (t - t.mean()).square().sum() / 2
    found = window.noise
    assert found.ratio.mean == pytest.approx(Q.item())
    assert found.ratio.stderr == pytest.approx((((s2 + ((x - 2 * Q * y) @ d) ** 2) / D**2).sqrt()).item())
    assert found.cosine == pytest.approx((x @ y / (x.norm() * D.sqrt())).item())
    c = torch.stack([z @ y / (z.norm() * D.sqrt()) for z in (x, r1 - n, r2 - n)])
    tilt = x @ d / (x.norm() * D.sqrt()) - c[0] * (y @ d) / D
    assert found.cosine_stderr == pytest.approx((c.var() + tilt**2).sqrt().item())
    assert window.cosines(relative=True)[1] == pytest.approx((x @ (r2 - n) / (x.norm() * (r2 - n).norm())).item())
    assert window.residual == pytest.approx(((m @ m - m @ (a1 + a2) + a1 @ a2).clamp_min(0) / (m @ m)).sqrt().item())
    assert window.norm_of_noise == pytest.approx(x.norm().item())
    assert [window.norm(i) for i in range(6)] == pytest.approx([v.norm().item() for v in (m, n, a1, a2, r1, r2)])
    assert window.sampling_error == pytest.approx((a1 - a2).norm().item() / 2)
    assert vars(window.baseline) == pytest.approx(vars(compare(m, n)), nan_ok=True)


def test_an_expanded_path_against_the_averaged_one():
    generator = torch.Generator().manual_seed(8)
    m, n, a1, a2, r, s = torch.randn(6, P, generator=generator, dtype=torch.float64) + 1
    window = CoupledWindow.of(m, a1, a2, baseline=n, expanded=s, replicas=[r])
    D = (a1 - n) @ (a2 - n)
    cosine, ratio = window.expansion
    assert cosine == pytest.approx(((s - n) @ ((a1 + a2) / 2 - n) / ((s - n).norm() * D.sqrt())).item())
    assert ratio == pytest.approx(((s - n).norm() / D.sqrt()).item())
    without = CoupledWindow.of(m, a1, a2, baseline=n, replicas=[r])
    assert (window.num_replicas, window.noise, window.cosines(relative=True)) == (
        1,
        without.noise,
        without.cosines(relative=True),
    )
    assert without.expansion is None
    assert CoupledWindow.of(m, a1, a2, expanded=s).expansion is None


def test_a_window_goes_through_a_checkpoint(tmp_path):
    (window,) = windows(1, 7, speed=1.0, ratio=None, wobble=0.4, error=0.2, replicas=2)
    torch.save(window.state_dict(), tmp_path / "window.pt")
    again = CoupledWindow.from_state(torch.load(tmp_path / "window.pt", weights_only=True))
    assert (again.speed, again.noise, again.num_replicas) == (window.speed, window.noise, 2)
