"""Checkpoints of a finished run: the live monitor's distances and displacements, and its reasons."""

import csv
import functools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tests.problems import Bent
from tests.zoo import (
    LEVELS,
    AdamW,
    Bending,
    LayerNormed,
    Net,
    Normed,
    data,
    fit,
    groups,
    identical,
    monitor_of,
    seeded,
    with_optimizer,
)
from torch_singlim import AntiCorrelated, CustomNoise, InjectNoise, measure_checkpoints
from torch_singlim.__main__ import main
from torch_singlim.measure import Code

SAME = ("excess_loss", "distance/nearest", "distance/linearised", "distance/relaxed", "distance/relaxed_share")
SAME += ("window/steps", "window/status", "drift/measured", "limit/spread_measured")
MOTION = {"window/steps", "window/status", "drift/measured"}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's own, about trainings this small


class Saver(ModelCheckpoint):
    """Keeps a checkpoint of every tenth step and of the first."""

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(f"{self.dirpath}/step=0.ckpt", weights_only=self.save_weights_only)


def saved(folder, make, *callbacks, batch_size=6, **options):
    """Checkpoints of a training of 20 steps."""
    saver = Saver(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1, **options)
    fit(seeded(make), *callbacks, saver, batch_size=batch_size)
    files = sorted(folder.glob("*.ckpt"))
    assert [file.name for file in files] == ["step=0.ckpt", "step=10.ckpt", "step=20.ckpt"]
    return files


def measured(module, files, **options):
    """On samples and batches of `fit`; the module is put back."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = measure_checkpoints(module, data().tensors, files, **{"batch_size": 6, "num_draws": 4} | options)
    assert all(identical(tensor, before[name]) for name, tensor in module.state_dict().items())
    return found


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Live monitor and checkpoints of the same steps, once for each kind of training."""

    @functools.cache
    def of(kind):
        make, noise = KINDS[kind]
        monitor = monitor_of(every_n_steps=10, window=10, num_draws=4)
        injected = [InjectNoise(noise)] if noise else []
        return monitor, saved(tmp_path_factory.mktemp("checkpoints"), make, *injected, monitor)

    return of


KINDS = {
    "dropout": (Net, None),
    "momentum": (lambda: Net(momentum=0.5), None),
    "transient": (lambda: Net(dropout=0.0), AntiCorrelated(0.05)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_live(kind, live):
    monitor, files = live(kind)
    make, noise = KINDS[kind]
    found = measured(make(), files[::-1], noise=noise)
    assert list(found.history) == [0, 10, 20]
    assert found.reasons == ()
    assert "| 10-20 |" in found.verdict
    for step, point in found.history.items():
        known = monitor.history[step]
        for tag in SAME:
            assert (tag in point) == (tag in known), (step, tag)
            if tag in known:
                assert point[tag] == pytest.approx(known[tag], rel=1e-6), (step, tag)
        if step:
            assert {"drift/cosine", "drift/baseline_cosine", "noise/ratio", "limit/frozen_cosine"} <= point.keys()
            assert not {"window/replay_error", "distance/baseline_moved"} & point.keys()


def test_of_full_batches_the_effective_flow_is_the_averaged_path(tmp_path):
    """Then the two models of the motion are one, up to sampling errors, and the baselines up to rounding errors."""
    monitor = monitor_of(every_n_steps=10, window=10, num_draws=4, draws=64)
    found = measured(Net(), saved(tmp_path, Net, monitor, batch_size=20), batch_size=20)
    for step in (10, 20):
        point, known = found.history[step], monitor.history[step]
        assert point["drift/baseline_cosine"] == pytest.approx(known["drift/baseline_cosine"], rel=1e-3)
        assert point["drift/predicted"] == pytest.approx(known["drift/predicted"], rel=0.05)
        assert point["drift/cosine"] == pytest.approx(known["drift/cosine"], abs=0.03)


def test_from_the_shell(live, tmp_path, capsys, monkeypatch):
    monitor, files = live("dropout")
    # modules of the present folder are found
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_offline.py").write_text(
        "from tests.zoo import Net, data\n\n\ndef module():\n    return Net()\n\n\n"
        "def samples():\n    return data().tensors\n"
    )
    out = tmp_path / "measured"
    command = ["measure", *map(str, files), "--batch-size", "6", "--out", str(out)]
    command += ["--module", "mine_of_offline:module", "--data", "mine_of_offline:samples"]
    main(command)
    printed = capsys.readouterr().out
    assert "| step | excess loss | distance to half |" in printed
    rows = {int(row["step"]): row for row in csv.DictReader((out / "metrics.csv").read_text().splitlines())}
    known = monitor.history[20]["distance/nearest"]
    assert float(rows[20]["singlim/distance/nearest"]) == pytest.approx(known, rel=1e-6)
    main(["report", str(out), "--out", str(tmp_path / "report")])
    assert (tmp_path / "report" / "report.html").exists()
    # a second time nothing is replaced
    with pytest.raises(SystemExit):
        main(command)
    assert "metrics.csv is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "expected package.module:name"),
        ("absent.py:x", "absent.py:x was not found"),
        ("math:x", "math:x was not found"),
    ],
)
def test_names_that_are_not_there(reference, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["measure", "a.ckpt", "--module", reference, "--data", reference, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


class Narrow(Net):
    def __init__(self):
        super().__init__(hidden=16)


def test_bad_input(live, tmp_path):
    _, files = live("dropout")
    with pytest.raises(ValueError, match=r"step=0\.ckpt is a checkpoint of another module than Narrow: size mismatch"):
        measured(Narrow(), files)
    with pytest.raises(ValueError, match="no checkpoints"):
        measured(Net(), [])
    with pytest.raises(ValueError, match=r"no checkpoint .*absent\.ckpt"):
        measured(Net(), [tmp_path / "absent.ckpt"])
    (tmp_path / "cut.ckpt").write_bytes(files[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read as a checkpoint"):
        measured(Net(), [tmp_path / "cut.ckpt"])
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain\.pt is no checkpoint of Lightning"):
        measured(Net(), [tmp_path / "plain.pt"])
    with pytest.raises(ValueError, match="two checkpoints of step 0"):
        measured(Net(), [files[0], files[0]])


def nudge(loss, w, x, y, eta):
    return loss(w + eta, x, y)


def test_the_order_of_a_custom_noise_is_measured(tmp_path):
    noise = CustomNoise(nudge, std=0.01)

    def make():
        return Net(dropout=0.0, hidden=12)

    files = saved(tmp_path, make, InjectNoise(noise))
    found = measured(make(), files, noise=noise)
    assert found.reasons == ()
    assert {"drift/cosine", "limit/frozen_cosine", "clock/time_scale"} <= found.history[20].keys()
    # at order 1: the drift is proportional to the step size
    assert found.history[20]["clock/time_scale"] == pytest.approx(1 / (0.2 * 0.01**2))


@pytest.mark.parametrize("make", [Bending, lambda: LayerNormed(Bent)], ids=["function", "layer"])
def test_derivatives_are_checked(make, tmp_path):
    """Where they are wrong, so would the limit be; a level is proved all the same."""
    found = measured(make(), saved(tmp_path, make))
    (reason,) = found.reasons
    assert reason.code is Code.DERIVATIVES
    assert "differentiates this network wrongly" in str(reason)
    assert reason.sentence in found.verdict
    assert {tag for point in found.history.values() for tag in point} == MOTION | LEVELS | {
        "excess_loss",
        "cost/overhead",
    }


def with_distances(found):
    """Distances and the motion, and no prediction."""
    assert all("distance/nearest" in point for point in found.history.values())
    assert all(point.keys() >= MOTION for step, point in found.history.items() if step)
    assert not {t for p in found.history.values() for t in p if t.startswith(("limit/", "noise/", "drift/cosine"))}
    assert all(reason.sentence in found.verdict for reason in found.reasons)
    return [reason.code for reason in found.reasons]


def test_batch_normalisation_has_distances(tmp_path):
    found = measured(Normed(), saved(tmp_path, Normed))
    assert with_distances(found) == [Code.BATCH_NORMALISATION]


OTHERS = {
    "adamw": (AdamW, Code.OPTIMIZER, "the theory covers torch.optim.SGD, and Adam"),
    "groups": (with_optimizer(lambda m: groups(m, {"lr": 0.1}, {})), Code.GROUPS_DIFFER, "does not name"),
    "standing": (with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=0.0)), Code.NO_STEP_SIZE, "rate is 0"),
    "part": (
        with_optimizer(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.2)),
        Code.OTHER_PARAMETERS,
        "holds 2 parameters, 4 are measured",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_optimizers_have_distances(kind, tmp_path):
    make, code, message = OTHERS[kind]
    files = saved(tmp_path, make)
    found = measured(make(), files)
    assert with_distances(found) == [code]
    assert message in str(found.reasons[0])
    moved = found.history[20]["drift/measured"]
    ends = [torch.load(file, weights_only=True)["state_dict"] for file in files[1:]]
    expected = torch.cat([(ends[1][name] - ends[0][name]).double().reshape(-1) for name in ends[0]])
    assert moved == pytest.approx(torch.linalg.vector_norm(expected).item(), rel=1e-6)


def test_weights_alone_have_distances(tmp_path):
    files = saved(tmp_path, Net, save_weights_only=True)
    assert "optimizer_states" not in torch.load(files[0], weights_only=True)
    found = measured(Net(), files)
    assert set(with_distances(found)) == {Code.NO_OPTIMIZER_STATE}
    assert "step=0.ckpt does not hold the state of one optimizer" in found.verdict


def test_transient_noise_on_a_part_of_the_weights(tmp_path):
    make = OTHERS["part"][0]
    found = measured(make(), saved(tmp_path, make, InjectNoise(AntiCorrelated(0.01))), noise=AntiCorrelated(0.01))
    assert with_distances(found) == [Code.OTHER_PARAMETERS]


def test_with_hard_labels_motion_and_levels_are_measured(tmp_path):
    def make():
        return Net("hard")

    found = measured(make(), saved(tmp_path, make))
    assert [reason.code for reason in found.reasons] == [Code.NOT_ATTAINED]
    assert {tag for point in found.history.values() for tag in point} >= MOTION | {"distance/half", "cost/overhead"}
    assert not any("distance/nearest" in point for point in found.history.values())
