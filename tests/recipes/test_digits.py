"""The digits recipe from end to end at a small size; its check fails where it should."""

import pytest

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
def test_it_fails_where_theory_and_training_part(tmp_path):
    # in the fast phase the loss alone explains the motion: the baseline must catch that
    with pytest.raises(SystemExit, match=r"baseline cosine < 0\.6"):
        main(**SMALL, out=tmp_path / "digits")


@pytest.mark.parametrize("noise", ["label_noise", "langevin", "input_noise", "minibatch"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_other_noises_are_reported_where_they_are_too_weak(noise, tmp_path, capsys):
    level = None if noise == "minibatch" else 1e-4
    main(noise=noise, level=level, **SMALL, out=tmp_path / "digits", check=noise != "langevin")
    printed = capsys.readouterr().out
    if noise == "langevin":
        assert "diffusion hides that" in printed
        return
    assert "nothing to check" in printed
    assert "not resolved" in printed or "it would take windows of about" in printed
    assert ("no motion along the zero-loss set" in printed) == (noise == "minibatch")
