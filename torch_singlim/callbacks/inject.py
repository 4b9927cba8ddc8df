"""Noise injected into the training of any LightningModule, by the same object that the theory predicts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from torch_singlim.callbacks.detect import BatchToProblem, as_pair, read_samples, recognise_loss
from torch_singlim.network import ActivationSite
from torch_singlim.noise import NoiseSystem, Sum, draw_noise, noisy_loss, parts

__all__ = ["InjectNoise", "injected_noise"]


@dataclass
class _Space:
    """What there is to perturb in one training step."""

    num_weights: int
    num_outputs: int
    input_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    sites: list[ActivationSite] = field(default_factory=list)


class InjectNoise(Callback):
    """Train under a noise system: the weights, batch or gradient of every step perturbed by its eta.

        w <- w - alpha grad_w Lhat(w, eta)

    Noise on the weights follows the chain rule: for `DropConnect` the gradient is that of w -> L(w * (1 + eta)).
    eta is drawn once for an optimizer step, accumulated batches included, the same on all processes; or once for each
    sample. Checkpoints hold the generators' state and the transient perturbation. The
    `SingularLimitMonitor` beside it finds the noise and predicts from it.

    Weights are here the trainable parameters that the optimizer holds. The tensors that a training step sees are
    perturbed for that step and put back after it.

    Args:
        noise: the system, or a sum. Dropout layers, minibatches and weight decay are in the training already.
        batch_to_problem: a batch -> (inputs, targets), two of its own tensors, for batches of another form.
        seed: of the noise.

    Raises:
        ValueError: at the start of training, where the noise does not fit it: `LabelNoise` without floating point
            targets and mse, `LabelFlips` without class labels and cross-entropy, a custom noise with
            Lhat(w, 0) != L(w), manual optimization, the same kind of noise twice.

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
        # one for what all processes draw alike, one for what each draws for its own samples
        self._generator, self._own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
        self.transient: Tensor | None = None
        """The transient perturbation that is in the weights at present ``[P]``; None: there is none."""
        self._rank = 0
        self._shared: dict[int, Tensor] = {}  # part -> eta of the optimizer step in progress
        self._swapped: list[tuple[Tensor, Tensor]] = []  # tensor, what it holds in truth
        self._perturbed: list[tuple[Tensor, Tensor]] = []  # the same for weights

    @property
    def perturbation(self) -> dict[nn.Parameter, Tensor]:
        """The transient perturbation of each parameter at present; empty: there is none."""
        if self.transient is None:
            return {}
        return dict(zip(self._parameters, self._split(self.transient), strict=True))

    @property
    def state_key(self) -> str:
        return self._generate_state_key(noise=repr(self.noise))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "own": self._own.get_state(), "transient": self.transient}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generator.set_state(state_dict["generator"])
        if self._rank == 0:  # whose state it is; the others begin anew, still independent
            self._own.set_state(state_dict["own"])
        self.transient = state_dict["transient"]

    # --- set-up ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Every fit starts the noise anew; a checkpoint is loaded after this."""
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
        self._parameters = [p for p in pl_module.parameters() if p.requires_grad and p in held]
        self._forward = tuple(part for part in parts(self.noise) if not part.transient)
        self._num_outputs = 0
        if any(part.checked_on_samples for part in self._forward):
            with isolate_rng():
                samples = read_samples(trainer, 16, batch_to_problem=self.batch_to_problem)
                loss, self._num_outputs = recognise_loss(pl_module, samples)
            for part in self._forward:
                part.check_targets(loss, samples.targets)
            self._check_quiet(samples.inputs[:2], samples.targets[:2])

    def _check_quiet(self, x: Tensor, y: Tensor) -> None:
        """Without noise nothing is perturbed; a custom noise uses the loss once, so that it can be injected."""
        system = self._drawn()
        w = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        x, y = x.to(w.device), y.to(w.device)
        etas = [0 * eta for eta in draw_noise(system, self._space(x), len(x), generator=torch.Generator())]
        at = _Perturbation.of(system, w, x, y, etas)
        same = torch.equal(at.weights, w) and torch.equal(at.inputs, x) and torch.equal(at.targets, y)
        shifted = at.shift is not None and bool(at.shift.abs().max() > 0)
        if not same or shifted or at.rest.detach().item() != 0.0 or at.factor != 1.0:
            raise ValueError(
                f"without noise the noisy loss of {self.noise} must be the loss, Lhat(w, 0) = L(w); at eta = 0 it "
                "changes weights, batch or value"
            )

    # --- one step --------------------------------------------------------------------------------------------------

    def _space(self, x: Tensor) -> _Space:
        first = self._parameters[0]
        count = sum(p.numel() for p in self._parameters)
        return _Space(count, self._num_outputs, x.shape[1:], first.dtype, first.device)

    def _draw(self, x: Tensor) -> list[Tensor]:
        """eta for each part: of this batch, or of the optimizer step that it belongs to."""
        space, etas = self._space(x), []
        for i, part in enumerate(self._forward):
            if not part.per_sample and i in self._shared:
                etas.append(self._shared[i])
                continue
            generator = self._own if part.per_sample else self._generator
            (eta,) = draw_noise(part, space, len(x), generator=generator)
            if not part.per_sample:
                self._shared[i] = eta
            etas.append(eta)
        return etas

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Perturb what this training step will see."""
        x, y = as_pair(batch, self.batch_to_problem)
        if self.batch_to_problem is not None:
            held: list[int] = []
            apply_to_collection(batch, Tensor, lambda tensor: held.append(id(tensor)))
            if not {id(x), id(y)} <= set(held):
                raise ValueError(
                    "InjectNoise perturbs the batch's own tensors, and batch_to_problem returned others: return "
                    "tensors of the batch as they are, and let the dataset do what is done to them"
                )
        etas = self._draw(x)
        with torch.no_grad():
            w = torch.cat([p.reshape(-1) for p in self._parameters])
            targets = y
            for part, eta in zip(self._forward, etas, strict=True):
                targets = part.redraw(targets, eta)
            at = _Perturbation.of(self._drawn(), w, x, targets, self._without_labels(etas))
            if at.weights is not w:
                for p, part in zip(self._parameters, self._split(at.weights), strict=True):
                    self._swap(self._perturbed, p, part)
            if at.inputs is not x:
                self._swap(self._swapped, x, at.inputs)
            shifted = at.targets if at.shift is None else at.targets + at.shift.reshape(y.shape)
            if shifted is not y:
                self._swap(self._swapped, y, shifted)

    def _drawn(self) -> NoiseSystem:
        """What enters through the arguments of the loss: all but new labels and transient perturbations."""
        return Sum(tuple(part for part in self._forward if not part.relabels))

    def _without_labels(self, etas: list[Tensor]) -> list[Tensor]:
        return [eta for part, eta in zip(self._forward, etas, strict=True) if not part.relabels]

    def _split(self, w: Tensor) -> list[Tensor]:
        pieces = w.split([p.numel() for p in self._parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)]

    @staticmethod
    def _swap(kept: list[tuple[Tensor, Tensor]], tensor: Tensor, value: Tensor) -> None:
        """The tensor holds other numbers for a while; nothing is written to its memory, which others may share."""
        kept.append((tensor, tensor.data))
        tensor.data = value.detach()

    @staticmethod
    def _put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
        for tensor, truth in kept:
            tensor.data = truth
        kept.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradient has been taken: the weights are themselves again."""
        self._put_back(self._perturbed)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Apply the chain rule of w -> w', add the noise's own terms; exchange the transient perturbation."""
        system = self._drawn()
        through = tuple(part for part in parts(system) if not part.per_sample)
        if through:
            etas = [self._shared[i] for i, part in enumerate(self._forward) if part in through]
            gradient = torch.cat([_grad(p).reshape(-1) for p in self._parameters])
            w = torch.cat([p.detach().reshape(-1) for p in self._parameters])
            noisy = _Perturbation.chain_rule(Sum(through), w, gradient, etas)
            for p, piece in zip(self._parameters, self._split(noisy), strict=True):
                p.grad = piece.clone()
        for part in parts(self.noise):
            if part.transient:
                self._exchange_transient(part)
        self._shared.clear()

    def _exchange_transient(self, part: NoiseSystem[Tensor]) -> None:
        """w += xi_{k+1} - xi_k; the step that follows subtracts alpha grad L(w)."""
        (eta,) = draw_noise(part, self._space(torch.zeros(1, 1)), 1, generator=self._generator)
        change = eta if self.transient is None else eta - self.transient.to(eta)
        self.transient = eta
        with torch.no_grad():
            for p, piece in zip(self._parameters, self._split(change), strict=True):
                p.add_(piece)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is itself again; so are the weights where the step was skipped."""
        self._put_back(self._swapped)
        self._put_back(self._perturbed)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no perturbed weights behind."""
        self._put_back(self._swapped)
        self._put_back(self._perturbed)


def _grad(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


@dataclass(frozen=True)
class _Perturbation:
    """What a noisy loss does to the arguments of the loss: Lhat(w, eta) = factor * L(w', x', y' + shift) + rest."""

    weights: Tensor
    inputs: Tensor
    targets: Tensor
    shift: Tensor | None
    rest: Tensor
    factor: float

    @classmethod
    def of(cls, system: NoiseSystem, w: Tensor, x: Tensor, y: Tensor, etas: list[Tensor]) -> _Perturbation:
        """Read off from one call, with a stand-in for the loss that notes its arguments."""
        calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        with torch.enable_grad():
            value = w.new_zeros((), requires_grad=True)

            def loss(
                w: Tensor, x: Tensor, y: Tensor, *, activations: Tensor | None = None, shift: Tensor | None = None
            ) -> Tensor:
                calls.append((w, x, y, shift))
                return value

            noisy = noisy_loss(system, loss, w, x, y, etas)
            if len(calls) != 1:
                raise ValueError(
                    f"a noise that is injected must use the loss exactly once, {system} uses it {len(calls)} times"
                )
            (factor,) = torch.autograd.grad(noisy, value, retain_graph=True)
        return cls(*calls[0], noisy, factor.item())

    @classmethod
    def chain_rule(cls, system: NoiseSystem, w: Tensor, gradient: Tensor, etas: list[Tensor]) -> Tensor:
        """grad_w Lhat(w, eta) = factor * (dw'/dw)^T grad L(w') + grad rest, from grad L(w') ``[P]``."""
        w = w.requires_grad_()
        at = cls.of(system, w, w.new_zeros(1), w.new_zeros(1), etas)
        noisy = gradient
        if at.weights is not w:
            (noisy,) = torch.autograd.grad(at.weights, w, gradient, retain_graph=True)
        if at.rest.requires_grad:
            (own,) = torch.autograd.grad(at.rest, w, allow_unused=True)
            return at.factor * noisy + (0 if own is None else own)
        return at.factor * noisy


def injected_noise(trainer: Trainer) -> NoiseSystem | None:
    """The sum of what the trainer's `InjectNoise` callbacks inject; None without any.

    Args:
        trainer: with its callbacks.

    Raises:
        ValueError: the same kind of noise twice.
    """
    systems = [part for each in trainer.callbacks if isinstance(each, InjectNoise) for part in parts(each.noise)]  # type: ignore[attr-defined]
    return Sum(tuple(systems)) if systems else None
