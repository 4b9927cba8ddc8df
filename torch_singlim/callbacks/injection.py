"""Apply an injected noise to the tensors of one network and its batches, for given draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_singlim.network import ActivationSite
from torch_singlim.noise import NoiseSystem, Sum, draw_noise, noisy_loss, parts

__all__ = ["Injection", "Perturbation"]

# number of a part -> eta of the optimizer step
StepNoise = dict[int, Tensor]


@dataclass
class _Space:
    """The quantities that can be perturbed in one training step."""

    num_weights: int
    num_outputs: int
    input_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    sites: list[ActivationSite] = field(default_factory=list)


class Injection:
    """A noise on the weights, batches and gradients of one network.

        w <- w - alpha grad_w Lhat(w, eta)

    Noise on the weights follows the chain rule: for `DropConnect` the gradient is that of w -> L(w * (1 + eta)). During
    a training step, the tensors of weights and batch have other data; their memory, which may be shared, is not
    written to.

    Args:
        noise: the system.
        parameters: the weights.
        num_outputs: C if the noise needs it; else 0.
        transient_in_forward: a transient perturbation enters as L(w + xi), so that the parameters are the weights of
            the recursion; otherwise the parameters contain xi, and `exchange_transient` changes them.
    """

    def __init__(
        self,
        noise: NoiseSystem,
        parameters: Sequence[nn.Parameter],
        num_outputs: int,
        *,
        transient_in_forward: bool = False,
    ) -> None:
        self.parameters, self.num_outputs = list(parameters), num_outputs
        self.forward = tuple(part for part in parts(noise) if transient_in_forward or not part.transient)
        self.transients = tuple(part for part in parts(noise) if part.transient and not transient_in_forward)
        # the parts that enter through the arguments of the loss: all but those that redraw labels
        self.system = Sum(tuple(part for part in self.forward if not part.relabels))
        self._batch: list[tuple[Tensor, Tensor]] = []  # tensor, its data without perturbation
        self._weights: list[tuple[Tensor, Tensor]] = []

    # --- draws -----------------------------------------------------------------------------------------------------

    def space(self, x: Tensor) -> _Space:
        """The quantities that can be perturbed, for a batch of inputs x."""
        first = self.parameters[0]
        count = sum(p.numel() for p in self.parameters)
        return _Space(count, self.num_outputs, x.shape[1:], first.dtype, first.device)

    def draw(
        self, x: Tensor, shared: StepNoise, *, generator: torch.Generator, per_sample: torch.Generator
    ) -> list[Tensor]:
        """eta for each part, either of this batch, or of the optimizer step that the batch belongs to.

        Args:
            x: inputs of the batch.
            shared: the eta of this optimizer step that were drawn so far; new ones are added.
            generator: of noise that is drawn once for a step.
            per_sample: generator of noise that is drawn for each sample.
        """
        space, etas = self.space(x), []
        for i, part in enumerate(self.forward):
            if not part.per_sample and i in shared:
                etas.append(shared[i])
                continue
            (eta,) = draw_noise(part, space, len(x), generator=per_sample if part.per_sample else generator)
            if not part.per_sample:
                shared[i] = eta
            etas.append(eta)
        return etas

    # --- one batch -------------------------------------------------------------------------------------------------

    def perturb(self, x: Tensor, y: Tensor, etas: Sequence[Tensor]) -> None:
        """Replace the data of weights, inputs and targets by the perturbed ones, until they are restored."""
        with torch.no_grad():
            w = torch.cat([p.reshape(-1) for p in self.parameters])
            targets = y
            for part, eta in zip(self.forward, etas, strict=True):
                targets = part.redraw(targets, eta)
            at = Perturbation.of(self.system, w, x, targets, self._without_labels(etas))
            if at.weights is not w:
                for p, part in zip(self.parameters, self.split(at.weights), strict=True):
                    self._swap(self._weights, p, part)
            if at.inputs is not x:
                self._swap(self._batch, x, at.inputs)
            shifted = at.targets if at.shift is None else at.targets + at.shift.reshape(y.shape)
            if shifted is not y:
                self._swap(self._batch, y, shifted)

    def put_weights_back(self) -> None:
        """Restore the weights."""
        self._put_back(self._weights)

    def put_batch_back(self) -> None:
        """Restore the batch."""
        self._put_back(self._batch)

    def unperturbed(self) -> Mapping[int, Tensor]:
        """id of each tensor that is perturbed at present -> its data without perturbation."""
        return {id(tensor): truth for tensor, truth in (*self._weights, *self._batch)}

    # --- one optimizer step ----------------------------------------------------------------------------------------

    def correct_gradients(self, shared: StepNoise) -> None:
        """Apply the chain rule of w -> w' to the gradients, and add the gradients of additive terms."""
        through = tuple(part for part in parts(self.system) if not part.per_sample)
        if not through:
            return
        etas = [shared[i] for i, part in enumerate(self.forward) if part in through]
        gradient = torch.cat([_grad(p).reshape(-1) for p in self.parameters])
        w = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        noisy = Perturbation.chain_rule(Sum(through), w, gradient, etas)
        for p, piece in zip(self.parameters, self.split(noisy), strict=True):
            p.grad = piece.clone()

    def draw_transient(self, generator: torch.Generator) -> Tensor | None:
        """The next transient perturbation ``[P]``; None if the noise has none."""
        for part in self.transients:
            (eta,) = draw_noise(part, self.space(torch.zeros(1, 1)), 1, generator=generator)
            return eta
        return None

    def exchange_transient(self, old: Tensor | None, new: Tensor | None) -> None:
        """w += xi_{k+1} - xi_k; the optimizer step after this subtracts alpha grad L(w_k)."""
        if new is None:
            return
        change = new if old is None else new - old.to(new)
        with torch.no_grad():
            for p, piece in zip(self.parameters, self.split(change), strict=True):
                p.add_(piece)

    # ---------------------------------------------------------------------------------------------------------------

    def split(self, w: Tensor) -> list[Tensor]:
        """A vector ``[P]`` in the shapes of the parameters."""
        pieces = w.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _without_labels(self, etas: Sequence[Tensor]) -> list[Tensor]:
        return [eta for part, eta in zip(self.forward, etas, strict=True) if not part.relabels]

    @staticmethod
    def _swap(kept: list[tuple[Tensor, Tensor]], tensor: Tensor, value: Tensor) -> None:
        kept.append((tensor, tensor.data))
        tensor.data = value.detach()

    @staticmethod
    def _put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
        for tensor, truth in reversed(kept):
            tensor.data = truth
        kept.clear()


def _grad(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


@dataclass(frozen=True)
class Perturbation:
    """The arguments of the loss within the noisy loss: Lhat(w, eta) = factor * L(w', x', y' + shift) + rest."""

    weights: Tensor
    inputs: Tensor
    targets: Tensor
    shift: Tensor | None
    rest: Tensor
    factor: float

    @classmethod
    def of(cls, system: NoiseSystem, w: Tensor, x: Tensor, y: Tensor, etas: Sequence[Tensor]) -> Perturbation:
        """From one call of the noisy loss, with a function instead of the loss that records its arguments."""
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
    def chain_rule(cls, system: NoiseSystem, w: Tensor, gradient: Tensor, etas: Sequence[Tensor]) -> Tensor:
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
