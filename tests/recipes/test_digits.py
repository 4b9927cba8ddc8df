"""The digits recipe from end to end at a small size; its check fails where it should."""

import pytest

from recipes.digits import main

SMALL = {"samples": 24, "hidden": 24, "steps": 40, "window": 20, "batch_size": 6}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_digits(tmp_path, capsys):
    # in the fast phase the loss alone explains the motion: the baseline must catch that
    with pytest.raises(SystemExit, match=r"baseline cosine < 0\.6"):
        main(**SMALL, out=tmp_path / "digits")
    printed = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path / 'digits'}" in printed
    figure = tmp_path / "digits" / "version_0" / "drift.png"
    assert f"figure: {figure}" in printed
    assert figure.stat().st_size > 10_000
    assert list((tmp_path / "digits" / "version_0").glob("events*"))


@pytest.mark.parametrize("noise", ["input_noise", "minibatch"])
def test_other_noises_are_reported_where_they_are_too_weak(noise, tmp_path, capsys):
    main(noise=noise, level=None if noise == "minibatch" else 1e-4, **SMALL, out=tmp_path / "digits")
    printed = capsys.readouterr().out
    assert "nothing to check" in printed
    assert "not resolved" in printed or "it would take windows of about" in printed
    assert ("no motion along the zero-loss set" in printed) == (noise == "minibatch")


def test_the_length_of_diffusing_motion_is_checked(tmp_path):
    # far from the zero-loss set the loss moves the weights, much further than diffusion
    with pytest.raises(SystemExit, match="missed: length of the motion along the zero-loss set"):
        main(noise="langevin", level=1e-4, **SMALL, out=tmp_path / "digits")


def test_label_noise_runs(tmp_path, capsys):
    main(noise="label_noise", **SMALL, out=tmp_path / "digits", check=False)
    assert "LabelNoise(std=0.5): order 2" in capsys.readouterr().out
