"""Each network of the zoo for a handful of steps, the table of made-up rows, and the command at a small size."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from recipes import zoo
from recipes.networks import digits_resnet18, set_dropout
from recipes.text import BEGINNING, next_characters
from recipes.zoo import Row, train
from torch_singlim.measure import budget

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

ROW = Row(
    "mlp", "sgd", 100, 0.01, 0.1, 0.95, 0.96, 1.02, 0.01, 0.2, 1.0, 0.1, 0.0, 7.0, steps=(50, 20),
    reasons=("Note: as it is.",),
)  # fmt: skip


def half_resnet():
    """The ResNet-18 without its last two stages, which have nearly all of its 11 million weights."""
    net = digits_resnet18(zoo.DROPOUT)
    net[1].layer3 = net[1].layer4 = nn.Identity()
    net[1].fc = nn.Sequential(nn.Dropout(zoo.DROPOUT), nn.Linear(128, 10))
    return net


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A row takes seconds."""
    monkeypatch.setattr(budget, "_GRACE", 2.0)  # seconds for measurements
    for name, value in {"MOST": 4, "ASKED": 2, "MEASURED": 2}.items():
        monkeypatch.setattr(zoo, name, value)
    entries = {name: dataclasses.replace(each, batch_size=4, window=12) for name, each in zoo.NETWORKS.items()}
    entries["resnet18"] = dataclasses.replace(entries["resnet18"], make=half_resnet)
    monkeypatch.setattr(zoo, "NETWORKS", entries)


@pytest.mark.parametrize("network", zoo.NETWORKS)
def test_each_network_gives_a_row(network):
    row = train(network, "adamw" if network == "cnn" else "sgd", window=12, seed=0)
    assert row.steps[0] == 4
    assert 3 <= row.steps[1] <= 12
    assert row.replay == 0
    assert 0 < row.excess < 2
    assert row.cost > 1
    assert "drift/measured" in row.tags
    assert "excess_loss" in row.tags or any("was not recognised" in reason for reason in row.reasons)


def test_the_resnet_has_group_normalisation_and_dropout():
    net = digits_resnet18(0.1)
    assert net(torch.zeros(2, 64)).shape == (2, 10)
    kinds = {type(module) for module in net.modules()}
    assert {nn.GroupNorm, nn.Dropout} <= kinds
    assert not kinds & {nn.BatchNorm2d, nn.MaxPool2d}


def test_text_is_predicted_where_half_a_context_was_read():
    x, y = next_characters(zoo.CONTEXT).tensors
    assert x.shape == y.shape
    predicted = y != -100
    assert predicted.sum(1).unique().tolist() == [zoo.CONTEXT // 2 + 1]
    assert torch.equal(x[:, 1:][predicted[:, :-1]], y[:, :-1][predicted[:, :-1]])
    windows = x.shape[0]
    assert windows * zoo.CONTEXT // 2 > len(BEGINNING) - 2 * zoo.CONTEXT  # nearly all of it


@pytest.mark.parametrize("network", zoo.NETWORKS)
def test_all_dropout_can_be_switched_off(network):
    entry = zoo.NETWORKS[network]
    net, x = entry.make(), entry.data().tensors[0][:8]
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)  # torchvision's transformer begins with an output of zeros
    assert not torch.equal(net(x), net(x))
    set_dropout(net, 0.0)
    assert torch.equal(net(x), net(x))


def test_excess_loss_is_zero_on_the_zero_loss_set():
    data = zoo.NETWORKS["transformer"].data()
    labels = data.tensors[1]

    class Solution(nn.Module):
        def forward(self, x):
            scores = torch.full((len(x), 10), zoo.SMOOTHING / 10)
            scores[range(len(x)), labels[: len(x)]] += 1 - zoo.SMOOTHING
            return scores.log()

    assert abs(zoo.excess_loss(zoo.Learner(Solution(), "sgd", 0.1), data)) < 1e-6


def test_agreement_and_what_misses_it():
    assert ROW.agrees
    slow, aside = dataclasses.replace(ROW, speed=0.8), dataclasses.replace(ROW, cosine=0.8)
    assert slow.misses == ["the speed is 0.80 +- 0.01"]
    assert aside.misses == ["the cosine is 0.83 of the noise ceiling"]
    assert len(dataclasses.replace(slow, cosine=0.8).misses) == 2
    unknown = dataclasses.replace(ROW, cosine=math.nan)
    assert unknown.misses == ["the drift was not predicted", "Note: as it is."]
    far = dataclasses.replace(ROW, half=math.nan)
    assert zoo.notes([ROW, far]) == ["mlp, sgd: no distance to half of the excess loss. Note: as it is."]
    assert zoo.markdown([ROW, far]).endswith("Note: as it is.\n")
    assert zoo.promises([ROW] * 10 + [slow] * 4) == {"at least 10 of 14 trainings agree (10 do)": True}
    assert not any(zoo.promises([ROW] * 9 + [slow] * 5).values())


def test_the_command_writes_the_table(tmp_path, capsys):
    zoo.main(["mlp"], ("sgd",), quick=True, out=tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("network")
    assert f"table: {tmp_path / 'zoo.md'}" in printed
    (row,) = json.loads((tmp_path / "zoo.json").read_text())
    assert (row["network"], row["optimizer"], row["weights"]) == ("mlp", "sgd", 19210)
    assert (tmp_path / "zoo.md").read_text().count("\n") == 3
