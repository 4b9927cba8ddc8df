"""One training under the monitor, alone or as one of several processes: what was logged, and how much each evaluated.

As ``python -m tests.distributed_run CASE DEVICES OUT [fault] [alone]``.
"""

import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from tests.zoo import Net, Tied, data, fit, seeded, weights
from torch_singlim import AntiCorrelated, DropConnect, InjectNoise, SingularLimitMonitor
from torch_singlim.geometry import curvature
from torch_singlim.measure import geometry
from torch_singlim.network import FunctionalModule

SAMPLES = 20
CASES = {
    "plain": {},
    # and with figures, for which every process takes part in the products
    "dropout by products": {"products": True},
    "dropout in training": {"dropout": 0.2},
    # where every layer is a matrix, one process has its products from a cached linearisation, and no call is counted
    "by columns": {"way": "columns", "network": Tied},
    "by rows": {"way": "rows"},
    "weight noise": {"inject": DropConnect(0.1)},
    "transient noise": {"inject": AntiCorrelated(0.01)},
    "no problem": {"loss": "half"},
}


class Failing(L.Callback):
    """One process cannot measure at a step, nor advance its paths at another one."""

    def __init__(self, monitor, rank, *, measure, advance):
        self.monitor, self.rank, self.steps = monitor, rank, {"measure": measure, "advance": advance}

    def on_train_start(self, trainer, pl_module):
        for name, step in self.steps.items():
            setattr(self.monitor.engine, name, self.failing(trainer, step, getattr(self.monitor.engine, name)))

    def failing(self, trainer, at, original):
        def called(*args, **options):
            if (trainer.global_rank, trainer.global_step) == (self.rank, at):
                raise ArithmeticError("thrown on purpose")
            return original(*args, **options)

        return called


def main(name: str, devices: int, out: Path, fault: bool, monitored: bool) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows, case = 0, CASES[name]
    evaluate = FunctionalModule.__call__

    def counted(self, w, x, *rest):
        nonlocal rows
        rows += len(x)
        return evaluate(self, w, x, *rest)

    FunctionalModule.__call__ = counted
    curvature._TINY = 0  # a process alone would form B, and evaluate few samples for its products
    if case.get("products"):
        geometry.measure_distance = partial(geometry.measure_distance, max_dense=0)
    if "way" in case:
        gram_matrix = curvature.gram_matrix
        curvature.gram_matrix = lambda *args, **options: gram_matrix(*args, **options | {"way": case["way"]})
    monitor = SingularLimitMonitor(every_n_steps=5, window=5, replicas=2)
    callbacks = [InjectNoise(case["inject"])] if "inject" in case else []
    callbacks += [monitor] if monitored else []
    callbacks += [Failing(monitor, rank=1, measure=5, advance=12)] if fault else []
    net = case.get("network", Net)
    model, trainer = fit(
        seeded(lambda: net(loss=case.get("loss", "mse"), dropout=case.get("dropout", 0.0), momentum=0.5)),
        *callbacks,
        steps=15,
        dataset=data(n=SAMPLES),
        batch_size=SAMPLES // devices,  # every process has its part of the one batch
        shuffle=False,
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        precision="64-true",
        logger=TensorBoardLogger(out.parent, name=f"board {out.name}") if case.get("products") else False,
    )
    history = {f"{step} {tag}": value for step, tags in monitor.history.items() for tag, value in tags.items()}
    found = {"history": history, "weights": weights(model).tolist(), "rows": rows, "verdict": monitor.verdict}
    found["reasons"] = [reason.state_dict() for reason in monitor.reasons]
    out.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():  # gloo's threads do not always survive the end of the interpreter
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    how = sys.argv[4:]
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), fault="fault" in how, monitored="alone" not in how)
