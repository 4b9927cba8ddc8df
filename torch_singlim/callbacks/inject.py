"""Noise injected into the training of any LightningModule, by the same object that the theory predicts from."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from torch_singlim.callbacks.detect import BatchToProblem, as_pair, read_samples, recognise_loss
from torch_singlim.callbacks.injection import Injection, Perturbation
from torch_singlim.network import RandomState
from torch_singlim.noise import NoiseSystem, Sum, draw_noise, parts

__all__ = ["InjectNoise", "injected_noise", "injectors", "transients"]


class InjectNoise(Callback):
    """Train with a noise system: its eta perturbs the weights, the batch or the gradient of every step.

        w <- w - alpha grad_w Lhat(w, eta)

    Noise on the weights follows the chain rule: for `DropConnect` the gradient is that of w -> L(w * (1 + eta)). It is
    drawn once for each optimizer step, including accumulated batches, and is the same on all processes; noise on
    samples is drawn for each sample. Checkpoints contain the state of the generators and the transient perturbation. A
    `SingularLimitMonitor` of the same trainer detects the noise and uses it for its prediction.

    The weights are the trainable parameters that the optimizer holds. Weights and batch are perturbed during a training
    step only, and restored after it.

    Args:
        noise: the system, or a sum. Dropout layers, minibatches and weight decay are part of the training already.
        batch_to_problem: a batch -> (inputs, targets), two tensors of the batch itself, for batches of another form.
        seed: of the noise.

    Raises:
        ValueError: at the start of training, if the noise does not fit: `LabelNoise` without floating point targets and
            mse, `LabelFlips` without class labels and cross-entropy, a custom noise with Lhat(w, 0) != L(w), manual
            optimization, the same kind of noise twice.

    >>> from torch_singlim.noise import LabelNoise
    >>> InjectNoise(LabelNoise(std=0.1)).noise
    LabelNoise(std=0.1)
    """

    def __init__(self, noise: NoiseSystem, *, batch_to_problem: BatchToProblem | None = None, seed: int = 0) -> None:
        for part in parts(noise):
            if part.done_by is not None:
                raise ValueError(f"{type(part).__name__} is not to be injected: {part.done_by}")
        self.noise, self.batch_to_problem = noise, batch_to_problem
        self.seed = seed
        # the first generator draws the same noise on all processes, the second one the noise on this process's samples
        self._generator, self._own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
        self.transient: Tensor | None = None
        """The transient perturbation that the weights contain at present ``[P]``; None: there is none."""
        self.injection: Injection | None = None
        """Applies the noise to the network in training."""
        self.etas: list[Tensor] = []
        """The noise of the batch in progress, for each part that enters the loss."""
        self._rank = 0
        self._shared: dict[int, Tensor] = {}  # part -> eta of the optimizer step in progress

    @property
    def perturbation(self) -> dict[nn.Parameter, Tensor]:
        """The transient perturbation of each parameter at present; empty: there is none."""
        if self.transient is None or self.injection is None:
            return {}
        return dict(zip(self.injection.parameters, self.injection.split(self.transient), strict=True))

    @property
    def state_key(self) -> str:
        return self._generate_state_key(noise=repr(self.noise))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "own": self._own.get_state(), "transient": self.transient}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generator.set_state(state_dict["generator"])
        if self._rank == 0:  # the checkpoint has the state of the first process; the others start new sequences
            self._own.set_state(state_dict["own"])
        self.transient = state_dict["transient"]

    # --- set-up ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the noise at the start of every fit; a checkpoint is loaded after this."""
        if stage != "fit":
            return
        self._rank = trainer.global_rank
        self._generator.manual_seed(self.seed)
        self._own.manual_seed(self.seed + 1 + self._rank)
        self.transient = None
        self._shared.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the noise fits the training."""
        injected_noise(trainer)
        if not pl_module.automatic_optimization:
            raise ValueError(
                "InjectNoise works with automatic optimization, got a module with automatic_optimization=False: let "
                "the Trainer call backward and step"
            )
        held = {p for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
        parameters = [p for p in pl_module.parameters() if p.requires_grad and p in held]
        self.injection = Injection(self.noise, parameters, 0)
        if any(part.checked_on_samples for part in self.injection.forward):
            with RandomState.isolated():
                samples = read_samples(trainer, 16, batch_to_problem=self.batch_to_problem)
                loss, self.injection.num_outputs = recognise_loss(pl_module, samples)
            for part in self.injection.forward:
                part.check_targets(loss, samples.targets)
            self._check_quiet(self.injection, samples.inputs[:2], samples.targets[:2])

    def _check_quiet(self, injection: Injection, x: Tensor, y: Tensor) -> None:
        """Check that eta = 0 perturbs nothing, and that a custom noise evaluates the loss once."""
        system = injection.system
        w = torch.cat([p.detach().reshape(-1) for p in injection.parameters])
        x, y = x.to(w.device), y.to(w.device)
        etas = [0 * eta for eta in draw_noise(system, injection.space(x), len(x), generator=torch.Generator())]
        at = Perturbation.of(system, w, x, y, etas)
        same = torch.equal(at.weights, w) and torch.equal(at.inputs, x) and torch.equal(at.targets, y)
        shifted = at.shift is not None and bool(at.shift.abs().max() > 0)
        if not same or shifted or at.rest.detach().item() != 0.0 or at.factor != 1.0:
            raise ValueError(
                f"without noise the noisy loss of {self.noise} must be the loss, Lhat(w, 0) = L(w); at eta = 0 it "
                "changes weights, batch or value"
            )

    # --- one step --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Perturb weights and batch for this training step."""
        assert self.injection is not None
        x, y = as_pair(batch, self.batch_to_problem)
        if self.batch_to_problem is not None:
            held: list[int] = []
            apply_to_collection(batch, Tensor, lambda tensor: held.append(id(tensor)))
            if not {id(x), id(y)} <= set(held):
                raise ValueError(
                    "InjectNoise perturbs the batch's own tensors, but batch_to_problem returned others: return "
                    "tensors of the batch unchanged, and transform them in the dataset"
                )
        self.etas = self.injection.draw(x, self._shared, generator=self._generator, per_sample=self._own)
        self.injection.perturb(x, y, self.etas)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the weights: the gradient has been computed."""
        # in the reverse order of the perturbations, whichever callback is called first
        for each in reversed(injectors(trainer)):
            if each.injection is not None:
                each.injection.put_weights_back()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Apply the chain rule of w -> w', add the gradient of additive terms, exchange the transient perturbation."""
        assert self.injection is not None
        self.injection.correct_gradients(self._shared)
        transient = self.injection.draw_transient(self._generator)
        self.injection.exchange_transient(self.transient, transient)
        self.transient = transient
        self._shared.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore the batch, and also the weights if the step was skipped."""
        for each in reversed(injectors(trainer)):
            each.put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore weights and batch."""
        for each in reversed(injectors(trainer)):
            each.put_back()

    def put_back(self) -> None:
        """Restore weights and batch."""
        if self.injection is not None:
            self.injection.put_batch_back()
            self.injection.put_weights_back()


def injectors(trainer: Trainer) -> list[InjectNoise]:
    """The trainer's callbacks that inject noise."""
    return [each for each in trainer.callbacks if isinstance(each, InjectNoise)]  # type: ignore[attr-defined]  # Lightning sets them from a helper


def transients(trainer: Trainer) -> dict[nn.Parameter, Tensor]:
    """The transient perturbation that each parameter contains at present; empty: there is none."""
    total: dict[nn.Parameter, Tensor] = {}
    for each in injectors(trainer):
        for p, xi in each.perturbation.items():
            total[p] = total[p] + xi if p in total else xi
    return total


def injected_noise(trainer: Trainer) -> NoiseSystem | None:
    """The sum of the noises that the trainer's `InjectNoise` callbacks inject; None if there are none.

    Args:
        trainer: with its callbacks.

    Raises:
        ValueError: the same kind of noise twice.
    """
    systems = [part for each in injectors(trainer) for part in parts(each.noise)]
    return Sum(tuple(systems)) if systems else None
