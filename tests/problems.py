"""Small problems, and their truth by dense brute force: full Jacobians and Hessians, textbook formulas, no shortcuts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_singlim import ZeroLossProblem

DTYPE = torch.float64


@dataclass(frozen=True)
class Dense:
    """A chain of Linear, activation, Dropout, ... Linear, written out by hand on dense tensors."""

    net: nn.Sequential
    loss: str  # "mse" | "cross_entropy"
    inputs: Tensor
    targets: Tensor  # mse: [N, C]; cross-entropy: probabilities [N, C]

    @property
    def problem(self) -> ZeroLossProblem:
        return ZeroLossProblem(self.net, self.loss, self.inputs, self.targets)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.net.named_parameters()]

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    def parameters(self, w: Tensor) -> dict[str, Tensor]:
        out, i = {}, 0
        for name, p in self.net.named_parameters():
            out[name] = w[i : i + p.numel()].view(p.shape)
            i += p.numel()
        return out

    @property
    def rates(self) -> list[float]:
        return [m.p for m in self.net if isinstance(m, nn.Dropout)]

    @property
    def widths(self) -> list[int]:
        linear = [m for m in self.net if isinstance(m, nn.Linear)]
        return [m.out_features for m in linear[:-1]]

    def outputs(self, w: Tensor, eta: Tensor | None = None) -> Tensor:
        """[N, C]; eta [N, D]: each hidden activation times 1 + eta."""
        h, parameters, used = self.inputs, self.parameters(w), 0
        for name, layer in self.net.named_children():
            if isinstance(layer, nn.Dropout):
                if eta is not None:
                    h = h * (1 + eta[:, used : used + h.shape[1]])
                    used += h.shape[1]
            else:
                own = {k.removeprefix(f"{name}."): v for k, v in parameters.items() if k.startswith(f"{name}.")}
                h = functional_call(layer, own, (h,))
        return h

    def loss_of(self, f: Tensor) -> Tensor:
        if self.loss == "mse":
            return ((f - self.targets) ** 2).mean()
        q = self.targets
        return (q * (q.log() - f.log_softmax(1))).sum(1).mean()

    def L(self, w: Tensor, eta: Tensor | None = None) -> Tensor:
        return self.loss_of(self.outputs(w, eta))

    def jacobian(self, w: Tensor) -> Tensor:
        """[N, C, P] by torch.autograd, one output after another."""
        w = w.clone().requires_grad_()
        f = self.outputs(w)
        rows = [
            torch.autograd.grad(f[i, c], w, retain_graph=True)[0] for i, c in itertools.product(*map(range, f.shape))
        ]
        return torch.stack(rows).view(*f.shape, -1)

    def curvature(self, w: Tensor) -> Tensor:
        """A_i [N, C, C] at the outputs."""
        f = self.outputs(w)
        eye = torch.eye(f.shape[1], dtype=DTYPE)
        if self.loss == "mse":
            return (2 / f.shape[1]) * eye.expand(len(f), -1, -1)
        p = f.softmax(1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    def gauss_newton(self, w: Tensor) -> Tensor:
        """H [P, P] = mean of J^T A J."""
        J, A = self.jacobian(w), self.curvature(w)
        return torch.einsum("ncp,ncd,ndq->pq", J, A, J) / len(J)

    def sigma_squared(self) -> Tensor:
        """sigma_j^2 of each hidden unit [D]."""
        parts = [torch.full((n,), p / (1 - p), dtype=DTYPE) for n, p in zip(self.widths, self.rates, strict=True)]
        return torch.cat(parts)

    def dropout_potential(self, w: Tensor) -> Tensor:
        """(1/2) sum_j sigma_j^2 d^2 Lhat / d eta_j^2, sample by sample from the dense Hessian in eta; differentiable."""
        s2 = self.sigma_squared()
        zero = torch.zeros(len(self.inputs), len(s2), dtype=DTYPE)
        hessian = torch.func.hessian(lambda eta: self.L(w, eta))(zero)  # [N, D, N, D]
        own = torch.diagonal(torch.diagonal(hessian, dim1=0, dim2=2), dim1=0, dim2=1)  # [N, D]
        return 0.5 * (own * s2).sum()

    def dropout_potential_gradient(self, w: Tensor, h: float = 1e-4) -> Tensor:
        """By central differences of fourth order."""
        rows = []
        for e in torch.eye(len(w), dtype=DTYPE):
            at = [self.dropout_potential(w + k * h * e) for k in (-2, -1, 1, 2)]
            rows.append((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h))
        return torch.stack(rows)

    def dropout_noise_covariance(self, w: Tensor, batch: int) -> Tensor:
        """S [P, P]: covariance on Gamma of the batch gradient under dropout, sum over samples, units and outputs."""
        s2 = self.sigma_squared()
        zero = torch.zeros(len(self.inputs), len(s2), dtype=DTYPE)
        D = torch.func.jacfwd(lambda eta: self.outputs(w, eta))(zero)  # [N, C, N, D]
        D = torch.stack([D[i, :, i] for i in range(len(D))])  # [N, C, D]
        J, A = self.jacobian(w), self.curvature(w)
        G = torch.einsum("ncp,ncd,ndk->npk", J, A, D)
        return torch.einsum("npk,k,nqk->pq", G, s2, G) / (len(J) * batch)


def lyapunov_trace(H: Tensor, S: Tensor, alpha: float, rank: int) -> float:
    """tr X for H X + X H - alpha H X H = alpha S on the range of H, by the Kronecker product."""
    values, vectors = torch.linalg.eigh(H)
    V = vectors[:, -rank:]
    h, s = torch.diag(values[-rank:]), V.T @ S @ V
    eye = torch.eye(rank, dtype=DTYPE)
    operator = torch.kron(h, eye) + torch.kron(eye, h) - alpha * torch.kron(h, h)
    return torch.linalg.solve(operator, alpha * s.reshape(-1)).view(rank, rank).trace().item()


class Lion(torch.optim.Optimizer):
    """The sign of an average of gradients, with decoupled weight decay (arXiv 2302.06675)."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * torch.lerp(p.grad, m, first).sign())
                m.lerp_(p.grad, 1 - second)
        return loss


class Muon(torch.optim.Optimizer):
    """Heavy ball whose step is orthogonalised where it is a matrix, by Newton-Schulz iterations."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad)
                step = v / (v.norm() + 1e-7)
                for a, b, c in 5 * [(3.4445, -4.7750, 2.0315)] if p.ndim == 2 else ():
                    square = step @ step.T
                    step = a * step + (b * square + c * square @ square) @ step
                p.sub_(group["lr"] * step)
        return loss


def chain(sizes: list[int], activation: type[nn.Module], rates: list[float], *, bias: bool, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out, p in zip(sizes[:-2], sizes[1:-1], rates, strict=True):
        layers += [nn.Linear(n_in, n_out, bias=bias), activation(), nn.Dropout(p)]
    net = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=bias)).double()
    for p in net.parameters():
        p.data = 0.7 * torch.randn(p.shape, generator=generator, dtype=DTYPE)
    return net


def make(name: str) -> tuple[Dense, Tensor]:
    """A problem and a point exactly on its Gamma: the targets are the network's own outputs there."""
    generator = torch.Generator().manual_seed(100)

    def data(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator, dtype=DTYPE)

    if name == "scalar":
        net, x = chain([3, 6, 1], nn.Tanh, [0.2], bias=False, seed=1), data(4, 3)
    elif name == "two_layers":
        net, x = chain([2, 5, 4, 2], nn.GELU, [0.1, 0.3], bias=True, seed=2), data(5, 2)
    elif name == "cross_entropy":
        net, x = chain([3, 6, 3], nn.Tanh, [0.25], bias=True, seed=3), data(4, 3)
    elif name == "rank_deficient":  # a sample twice: its residuals' rows repeat
        net, x = chain([3, 6, 2], nn.Tanh, [0.2], bias=True, seed=4), data(4, 3)
        x[3] = x[0]
    elif name == "many_outputs":  # B B^T is cheap to form and to factor
        net, x = chain([3, 8, 4], nn.Tanh, [0.2], bias=True, seed=5), data(8, 3)
    else:
        raise KeyError(name)
    loss = "cross_entropy" if name == "cross_entropy" else "mse"
    with torch.no_grad():
        f = net.eval()(x)
        y = f.softmax(1) if loss == "cross_entropy" else f
    dense = Dense(net, loss, x, y)
    return dense, dense.weights()


def displaced(w: Tensor, size: float = 0.05, seed: int = 0) -> Tensor:
    """w and a Gaussian vector of this size in every component."""
    return w + size * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


NAMES = ["scalar", "two_layers", "cross_entropy", "rank_deficient"]


def digits_net(hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, 10))


class Bend(torch.autograd.Function):
    """x + x^3, with a second derivative of 0: the saved x is cut off from the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x + x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return (1 + 3 * ctx.saved_tensors[0].detach() ** 2) * g


class Bent(nn.Module):
    """A layer whose second derivative is wrong."""

    def forward(self, x):
        return Bend.apply(x)
