"""One training under the monitor, alone or as one of two processes: what was logged, and how much each evaluated."""

import json
import logging
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

import torch_singlim
from tests.callbacks.test_monitor import Net, data, seeded, weights
from tests.callbacks.test_setups import Tied
from torch_singlim import AntiCorrelated, DropConnect, InjectNoise, SingularLimitMonitor
from torch_singlim.network.functional import FunctionalModule
from torch_singlim.measure.distance import observe

SAMPLES = 20
CASES = {
    "plain": {},
    # and with figures, for which every process takes part in the products
    "dropout by products": {"products": True},
    "dropout in training": {"dropout": 0.2},
    # where every layer is a matrix, one process pushes through its kept pass, which makes no call that is counted
    "by pushing": {"way": "pushing", "network": Tied},
    "by rows": {"way": "rows"},
    "weight noise": {"inject": DropConnect(0.1)},
    "carried noise": {"inject": AntiCorrelated(0.01)},
}


def main(case: str, devices: int, out: Path, fault: bool, monitored: bool) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = 0
    evaluate = FunctionalModule.__call__

    def counted(self, w, x, *rest):
        nonlocal rows
        rows += len(x)
        return evaluate(self, w, x, *rest)

    FunctionalModule.__call__ = counted
    if CASES[case].get("products"):
        torch_singlim.callbacks.monitor.observe = lambda *a, **k: observe(*a, **k, max_dense=0)
    if "way" in CASES[case]:
        torch_singlim.geometry.gram._flops = lambda problem: {CASES[case]["way"]: 1.0}
    L.seed_everything(0, verbose=False)
    monitor = SingularLimitMonitor(every_n_steps=5, window=5, replicas=2, reference=True)
    injected = [InjectNoise(CASES[case]["inject"])] if "inject" in CASES[case] else []
    trainer = L.Trainer(
        max_steps=15,
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        precision="64-true",
        callbacks=[*injected, *([monitor] if monitored else [])],
        logger=TensorBoardLogger(out.parent, name=f"board {out.name}") if CASES[case].get("products") else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    make = CASES[case].get("network", Net)
    model = seeded(lambda: make(dropout=CASES[case].get("dropout", 0.0), momentum=0.5))
    if fault:

        def fail(*args, **kwargs):
            if trainer.global_rank == 1 and trainer.global_step == 5:
                raise ArithmeticError("thrown on purpose")
            return look(*args, **kwargs)

        look = monitor._look
        monitor._look = fail
    # every process has its half of the one batch
    trainer.fit(model, DataLoader(data(n=SAMPLES), batch_size=SAMPLES // devices))
    history = {f"{step} {tag}": value for step, tags in monitor.history.items() for tag, value in tags.items()}
    found = {"history": history, "weights": weights(model).tolist(), "rows": rows, "verdict": monitor.verdict}
    out.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    how = sys.argv[4:]
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), fault="fault" in how, monitored="alone" not in how)
