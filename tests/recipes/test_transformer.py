"""The transformer recipe from end to end at a small size; its attention is torch's."""

import pytest
import torch
from torch import nn

from recipes.networks import set_dropout
from recipes.transformer import Attention, Transformer, main

SMALL = {"samples": 48, "width": 16, "heads": 2, "layers": 1, "batch_size": 12, "before": 10, "steps": 40, "window": 20}


def test_the_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, x = Attention(width=12, heads=3).eval(), torch.randn(2, 5, 12)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.inputs.weight,
            "in_proj_bias": ours.inputs.bias,
            "out_proj.weight": ours.outputs.weight,
            "out_proj.bias": ours.outputs.bias,
        }
    )
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_an_image_is_a_row_of_tokens():
    net = Transformer(width=16, heads=2, layers=1)
    set_dropout(net, 0.0)
    images = torch.randn(3, 64)
    mixed = images.view(3, 8, 8).flip(1).reshape(3, 64)
    assert net(images).shape == (3, 10)
    assert not torch.allclose(net(images), net(mixed), atol=1e-3)  # the position of a row counts


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_transformer(tmp_path, capsys):
    # in the fast phase the loss alone explains the motion: the baseline must catch that
    with pytest.raises(SystemExit, match=r"baseline cosine at least 0\.1 lower"):
        main(**SMALL, out=tmp_path / "transformer")
    printed = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path / 'transformer'}" in printed
    assert "noise-induced drift" in printed
    assert (tmp_path / "transformer" / "version_0" / "drift.png").stat().st_size > 10_000
