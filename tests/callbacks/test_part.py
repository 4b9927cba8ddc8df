"""A part of the training set is measured: what is said of the whole, against the module's own loss on all of it."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from torch_singlim import SingularLimitMonitor
from torch_singlim.measure import Code, Level

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's own, about trainings this small


class Net(L.LightningModule):
    def __init__(self, hard):
        super().__init__()
        self.hard = hard
        self.net = nn.Sequential(nn.Linear(5, 48), nn.Tanh(), nn.Dropout(0.1), nn.Linear(48, 3))

    def forward(self, x):
        return self.net(x)

    def loss(self, x, y):
        return F.cross_entropy(self(x), y) if self.hard else F.mse_loss(self(x), F.one_hot(y, 3).to(x.dtype))

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Reads(Dataset):
    """The same samples, from a data set that is not read."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def trained(dataset, hard, **options):
    monitor = SingularLimitMonitor(window=8, max_overhead=None, replicas=0, draws=2, num_draws=2, **options)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=16, accelerator="cpu", logger=False, callbacks=[monitor], **quiet)
    torch.manual_seed(1)
    trainer.fit(model := Net(hard), DataLoader(dataset, 20, shuffle=True))
    return model, monitor


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_whole_training_set(hard, wrapped):
    torch.manual_seed(0)
    x, y = torch.randn(120, 5), torch.randint(3, (120,))
    dataset = TensorDataset(x, y)
    if wrapped:
        dataset, x, y = Subset(Subset(dataset, range(99, -1, -1)), range(10, 90)), x[10:90].flip(0), y[10:90].flip(0)
    model, monitor = trained(dataset, hard, num_samples=24)
    found = monitor.history[16]

    model.double().eval()
    present = model.loss(x.double(), y).item()
    part = model.loss(x[:24].double(), y[:24]).item()
    assert found["excess_loss"] == pytest.approx(part, rel=1e-6)
    for level in Level:
        point = monitor.engine.geometry.levels.points[level].double()
        torch.nn.utils.vector_to_parameters(point, model.parameters())
        assert model.loss(x[:24].double(), y[:24]).item() <= 1.001 * level.value * part
        share = model.loss(x.double(), y).item() / present
        assert found[f"distance/{level.name.lower()}_whole"] == pytest.approx(share, rel=1e-3)

    assert any(reason.code is Code.SUBSET for reason in monitor.reasons)
    fewer = {name: value for name, value in found.items() if name.startswith("distance/of_samples/")}
    if hard:
        assert not fewer
    else:
        assert list(fewer) == ["distance/of_samples/24", "distance/of_samples/12"]
        assert fewer["distance/of_samples/24"] == found["distance/nearest"] > fewer["distance/of_samples/12"] > 0
    assert "distance/growth" not in found  # two sizes


def test_samples_of_a_data_set_that_is_not_read():
    """They are gathered from the run's batches; nothing is said of the others."""
    torch.manual_seed(0)
    _, monitor = trained(Reads(torch.randn(120, 5), torch.randint(3, (120,))), False, num_samples=24)
    assert {"distance/half", "distance/nearest", "distance/of_samples/12"} <= monitor.history[16].keys()
    assert not any("whole" in name for name in monitor.history[16])


def test_where_all_samples_are_measured_there_is_no_part():
    torch.manual_seed(0)
    _, monitor = trained(TensorDataset(torch.randn(24, 5), torch.randint(3, (24,))), False)
    assert "distance/nearest" in monitor.history[16]
    assert not any("whole" in name or "of_samples" in name for name in monitor.history[16])
