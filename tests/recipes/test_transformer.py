"""The transformer recipe from end to end at a small size."""

import pytest
import torch

from recipes import transformer
from recipes.transformer import Transformer, main

SMALL = {"samples": 48, "width": 16, "heads": 2, "layers": 1, "batch_size": 12, "before": 10, "steps": 40, "window": 20}


def test_an_image_is_a_row_of_tokens():
    net = Transformer(width=16, heads=2, layers=1, dropout=0.0)
    images = torch.randn(3, 64)
    mixed = images.view(3, 8, 8).flip(1).reshape(3, 64)
    assert net(images).shape == (3, 10)
    assert not torch.allclose(net(images), net(mixed), atol=1e-3)  # the position of a row counts


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_transformer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformer, "MEASURED", 2)
    # in the fast phase the loss alone explains the motion: the baseline must catch that
    with pytest.raises(SystemExit, match=r"baseline cosine at least 0\.1 lower"):
        main(**SMALL, out=tmp_path / "transformer")
    printed = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path / 'transformer'}" in printed
    assert "noise-induced drift" in printed
    assert (tmp_path / "transformer" / "version_0" / "drift.png").stat().st_size > 10_000
