"""Recipes run from end to end at a small size; their checks say no when they should."""

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
def test_digits_fails_where_theory_and_training_part(tmp_path):
    # in the fast phase the loss alone explains the motion: the null control must catch that
    with pytest.raises(SystemExit, match=r"null cosine < 0\.6"):
        main(**SMALL, out=tmp_path / "digits")
