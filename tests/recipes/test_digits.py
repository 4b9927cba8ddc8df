"""Recipes run from end to end at a small size; their checks say no when they should."""

import dataclasses

import pytest

from recipes import time_scales
from recipes.digits import main

SMALL = {"samples": 24, "hidden": 32, "steps": 60, "window": 20, "batch_size": 6}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_digits(tmp_path, capsys):
    main(**SMALL, out=tmp_path / "digits", check=False)
    printed = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path / 'digits'}" in printed
    figure = tmp_path / "digits" / "version_0" / "drift.png"
    assert f"figure: {figure}" in printed
    assert figure.stat().st_size > 10_000
    assert list((tmp_path / "digits" / "version_0").glob("events*"))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_digits_fails_where_theory_and_training_part(tmp_path):
    # in the fast phase the loss alone explains the motion: the null control must catch that
    with pytest.raises(SystemExit, match=r"null cosine < 0\.6"):
        main(**SMALL, out=tmp_path / "digits")


@pytest.mark.parametrize("noise", ["label_noise", "langevin", "input_noise", "minibatch"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_digits_under_other_noise_say_what_is_too_weak(noise, tmp_path, capsys):
    level = None if noise == "minibatch" else 1e-3
    main(noise=noise, level=level, **SMALL, out=tmp_path / "digits", check=noise != "langevin")
    printed = capsys.readouterr().out
    expected = {
        "langevin": "diffusion hides that",
        "minibatch": "no motion along the zero-loss set",
    }.get(noise, "Too weak to see in windows of 20 steps")
    assert expected in printed
    if noise in ("label_noise", "input_noise"):
        assert "it would take windows of about" in printed
        assert "nothing to check" in printed


def test_time_scales(tmp_path, capsys, monkeypatch):
    quick = [dataclasses.replace(sweep, slow_time=0.002, crowd=1) for sweep in (time_scales.SWEEPS[1],)]
    monkeypatch.setattr(time_scales, "SWEEPS", quick)
    time_scales.main(replicas=4, alphas=[0.02, 0.04], out=tmp_path, check=False)
    printed = capsys.readouterr().out
    assert "| DropConnect |" in printed
    assert "minibatches alone: distance" in printed
    assert (tmp_path / "time_scales.png").stat().st_size > 10_000
    assert list(tmp_path.glob("events*"))
