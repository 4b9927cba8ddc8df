"""Fused functions in elementary operations, the dropout inside them, and what else a forward pass may do."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer
from torchvision.ops import StochasticDepth

from torch_singlim import Dropout, LabelNoise, ZeroLossProblem, linearize
from torch_singlim.network import FunctionalModule, RandomState
from torch_singlim.network.elementary import ElementaryMode
from torch_singlim.network.layers import gaussian_std
from torch_singlim.network.sites import Tape
from torch_singlim.noise import draw_noise
from torch_singlim.theory import check_derivatives

DTYPE = torch.float64


def same(function, *args, **kwargs):
    """A function of torch and its elementary form give the same."""
    expected = function(*args, **kwargs)
    with ElementaryMode(Tape()) as mode:
        found = function(*args, **kwargs)
    assert mode.used
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def randn(*shape):
    return torch.randn(*shape, dtype=DTYPE)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine):
    weight, bias = (randn(4, 8), randn(4, 8)) if affine else (None, None)
    same(F.layer_norm, randn(5, 3, 4, 8), (4, 8), weight, bias, eps=1e-3)
    same(nn.LayerNorm(8, elementwise_affine=affine).double(), randn(5, 8))


MASKS = {
    "none": None,
    "causal": "causal",
    "boolean": torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.4,
    "float": torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(0)).double(),
    "nothing to attend to": torch.tensor([[False] * 6] + [[True] * 6] * 3),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention(mask):
    q, k, v = randn(2, 3, 4, 5), randn(2, 3, 6, 5), randn(2, 3, 6, 7)
    given = {"is_causal": True} if mask == "causal" else {"attn_mask": MASKS[mask]}
    same(F.scaled_dot_product_attention, q, k, v, **given)
    same(F.scaled_dot_product_attention, q, k, v, scale=0.3, **given)


def test_grouped_queries():
    same(F.scaled_dot_product_attention, randn(2, 6, 4, 5), randn(2, 3, 4, 5), randn(2, 3, 4, 5), enable_gqa=True)


LAYERS = {
    "plain": {},
    "no bias": {"bias": False},
    "own sizes": {"kdim": 5, "vdim": 6},
    "added bias": {"add_bias_kv": True},
    "added zero": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize(("batch_first", "layer"), [*itertools.product([False, True], LAYERS)])
def test_multi_head_attention(batch_first, layer):
    torch.manual_seed(0)
    sizes = LAYERS[layer]
    attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first, **sizes).double().eval()
    q, k, v = randn(3, 4, 8), randn(3, 6, sizes.get("kdim", 8)), randn(3, 6, sizes.get("vdim", 8))
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    for need, options in itertools.product(
        [True, False],
        [
            {},
            {"key_padding_mask": padding},
            {"attn_mask": torch.rand(4, 6) > 0.8},
            {
                "attn_mask": randn(6, 4, 6),
                "key_padding_mask": torch.zeros(3, 6).double().masked_fill(padding, -torch.inf),
            },
            {"average_attn_weights": False},
        ],
    ):
        same(attention, q, k, v, need_weights=need, **options)
    same(attention, *(x[0] if batch_first else x[:, 0] for x in (q, k, v)))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm(old, dim):
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with pytest.warns(FutureWarning) if old else RandomState.isolated():
        layer = wrap(nn.Linear(3, 2).double(), dim=dim)
    x = randn(4, 3)
    same(layer, x)


RECURRENT = {
    "lstm": nn.LSTM,
    "projected": lambda *args, **kwargs: nn.LSTM(*args, proj_size=3, **kwargs),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(
    ("layers", "bias", "batch_first", "bidirectional"), [*itertools.product([1, 2], *[[True, False]] * 3)]
)
def test_recurrent_layers(kind, layers, bias, batch_first, bidirectional):
    torch.manual_seed(0)
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    layer = RECURRENT[kind](4, 5, num_layers=layers, **options).double().eval()
    same(layer, randn(3, 6, 4))
    same(layer, randn(6, 4))


def test_packed_sequences_are_left_alone():
    layer = nn.LSTM(4, 5).double().eval()
    packed = nn.utils.rnn.pack_sequence([randn(3, 4), randn(2, 4)])
    same(lambda: layer(packed)[0].data)


# --- networks that people train, with inputs [n, 5, 4] and outputs [n, 3] ----------------------------------------


class Around(nn.Module):
    """A layer on sequences between two linear ones; `batch_first` as the layer has it."""

    def __init__(self, layer, call=None, *, batch_first=True, width=8, out=8):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(4, width), layer, nn.Linear(out, 3)
        self.call, self.batch_first = call or (lambda layer, h: layer(h)), batch_first

    def forward(self, x):
        h = self.before(x)
        h = self.call(self.layer, h if self.batch_first else h.transpose(0, 1))
        return self.after(h.tanh().mean(1 if self.batch_first else 0))


def encoder(*, batch_first=True, norm_first=False):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, activation=F.gelu, batch_first=batch_first, norm_first=norm_first)
    return Around(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), batch_first=batch_first)


def attention(*, batch_first=True, need_weights=False):
    layer = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first)
    return Around(layer, lambda a, h: a(h, h, h, need_weights=need_weights)[0], batch_first=batch_first)


class Functional(nn.Module):
    """Attention and dropout by functions, as in nanoGPT."""

    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (h.unflatten(-1, (2, 4)).transpose(1, 2) for h in self.q(x).chunk(3, -1))
        rate = 0.2 if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(F.dropout(h.tanh(), 0.1, training=self.training)[:, -1])


class Folded(nn.Module):
    """Dropout on activations of which the samples are not the first axis."""

    def __init__(self, fold, unfold):
        super().__init__()
        self.before, self.drop, self.after = nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3)
        self.fold, self.unfold = fold, unfold

    def forward(self, x):
        h = self.drop(self.before(self.fold(x)).tanh())
        return self.after(self.unfold(h, len(x))).mean(1)


def flat(*layers, out=16):
    return nn.Sequential(nn.Flatten(), *layers, nn.Tanh(), nn.Dropout(0.1), nn.Linear(out, 3))


class Logits(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.net, self.form = flat(nn.Linear(20, 16)), form

    def forward(self, x):
        return self.form(self.net(x))


class Output:
    def __init__(self, logits):
        self.logits, self.loss = logits, None


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(20, 16), nn.Linear(16, 3), reentrant

    def forward(self, x):
        return self.last(checkpoint(lambda h: self.first(h).tanh(), x.flatten(1), use_reentrant=self.reentrant))


class DropPath(nn.Module):
    """Stochastic depth, as it is written in many repositories."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep


class GaussianDropout(nn.Module):
    """Multiplicative Gaussian noise with the variance of dropout."""

    def __init__(self, p):
        super().__init__()
        self.std = (p / (1 - p)) ** 0.5

    def forward(self, x):
        return x * torch.normal(1.0, self.std, x.shape, device=x.device, dtype=x.dtype) if self.training else x


class GaussianNoise(nn.Module):
    """The same in another form, on images alone."""

    def forward(self, x):
        assert x.ndim == 4
        return x if not self.training else x + x * torch.randn_like(x) * 0.3


class Residual(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.first, self.branch, self.drop = nn.Linear(4, 8), nn.Linear(8, 8), drop

    def forward(self, x):
        h = self.first(x)
        return (h + self.drop(self.branch(h).tanh()))[..., :3].mean(1)


# the network, and the shapes of one sample's masks
NETWORKS = {
    "encoder": (encoder, [(2, 5, 5), (5, 8), (5, 16), (5, 8)]),
    "encoder, norm first": (lambda: encoder(norm_first=True), [(2, 5, 5), (5, 8), (5, 16), (5, 8)]),
    "encoder, sequence first": (lambda: encoder(batch_first=False), [(2, 5, 5), (5, 8), (5, 16), (5, 8)]),
    "attention": (attention, [(2, 5, 5)]),
    "attention, sequence first": (lambda: attention(batch_first=False), [(2, 5, 5)]),
    "attention with its weights": (lambda: attention(need_weights=True), [(2, 5, 5)]),
    "functions": (Functional, [(2, 5, 5), (5, 8)]),
    "lstm": (lambda: Around(nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), lambda r, h: r(h)[0]), [(5, 8)]),
    "gru": (lambda: Around(nn.GRU(8, 8, 2, dropout=0.3), lambda r, h: r(h)[0], batch_first=False), [(5, 8)]),
    "weight norm": (lambda: flat(nn.utils.parametrizations.weight_norm(nn.Linear(20, 16))), [(16,)]),
    "sequence first": (
        lambda: Folded(lambda x: x.transpose(0, 1), lambda h, n: h.transpose(0, 1)),
        [(5, 8)],
    ),
    "folded": (lambda: Folded(lambda x: x.flatten(0, 1), lambda h, n: h.unflatten(0, (n, -1))), [(5, 8)]),
    "folded, sequence first": (
        lambda: Folded(lambda x: x.transpose(0, 1).flatten(0, 1), lambda h, n: h.unflatten(0, (-1, n)).transpose(0, 1)),
        [(5, 8)],
    ),
    "logits of an object": (lambda: Logits(Output), [(16,)]),
    "logits of a dictionary": (lambda: Logits(lambda f: {"logits": f, "other": f + 1}), [(16,)]),
    "one tensor of a tuple": (lambda: Logits(lambda f: (f, None)), [(16,)]),
    "checkpointed": (lambda: Checkpointed(reentrant=False), []),
    "checkpointed, reentrant": (lambda: Checkpointed(reentrant=True), []),
    "stochastic depth": (lambda: Residual(StochasticDepth(0.3, "row")), [(1, 1)]),
    "DropPath": (lambda: Residual(DropPath(0.3)), [(1, 1)]),
    "Gaussian dropout": (lambda: Residual(GaussianDropout(0.1)), [(5, 8)]),
    "Gaussian noise beside dropout": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5)),
            nn.Conv2d(1, 3, 3),
            nn.Tanh(),
            GaussianNoise(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(18, 3),
        ),
        [(3, 3, 2), (18,)],
    ),
}


def build(name):
    torch.manual_seed(0)
    make, shapes = NETWORKS[name]
    return make(), shapes


def problem_of(name):
    net, _ = build(name)
    return ZeroLossProblem(net, "mse", torch.randn(4, 5, 4), torch.randn(4, 3))


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_sites(name):
    net, shapes = build(name)
    f = FunctionalModule(net, dtype=DTYPE)
    x = randn(3, 5, 4)
    assert [site.shape for site in f.sites(x)] == shapes
    out = net.double().eval()(x.clone().requires_grad_())
    out = getattr(out, "logits", out)
    out = out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(f(f.weights(), x), out, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_derivatives(name):
    """Product with the Jacobian, with the Hessian, and all of `check_derivatives`, by finite differences in float64."""
    problem = problem_of(name)
    w, generator = problem.weights(), torch.Generator().manual_seed(1)
    v = torch.randn(w.shape, generator=generator, dtype=DTYPE)
    v, h = v / v.norm(), 1e-4

    def central(function):  # of fourth order
        at = {k: function(w + k * h * v) for k in (-2, -1, 1, 2)}
        return (at[-2] - 8 * at[-1] + 8 * at[1] - at[2]) / (12 * h)

    f = problem.outputs(w)
    Jv = linearize(problem, w).operator.matvec(v)
    torch.testing.assert_close(Jv, central(lambda u: problem.whiten(f, problem.outputs(u))), rtol=1e-6, atol=1e-8)
    Hv = problem.hessian_product(w, v)
    torch.testing.assert_close(Hv, central(problem.gradient), rtol=1e-6, atol=1e-8)
    check_derivatives(problem, (Dropout() + LabelNoise(0.1)) if problem.sites else LabelNoise(0.1))


@pytest.mark.parametrize("name", [name for name, (_, shapes) in NETWORKS.items() if shapes])
def test_noise_is_that_of_training(name):
    """Mean and variance of the outputs over many draws, beside those of the module in training mode."""
    problem, draws = problem_of(name), 8_192
    net = problem.function.module.double()
    x = problem.inputs[:1].expand(draws, *problem.input_shape).clone()
    torch.manual_seed(1)
    with torch.no_grad():
        out = net.train()(x)
        out = getattr(out, "logits", out)
        out = out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
        (eta,) = draw_noise(Dropout(), problem, draws, generator=torch.Generator().manual_seed(2))
        noisy = problem.function(problem.weights(), x, eta)
    error = (out.var(0) / draws).sqrt()
    assert bool(((noisy.mean(0) - out.mean(0)).abs() < 6 * error).all())
    torch.testing.assert_close(noisy.var(0), out.var(0), rtol=0.12, atol=0)


def test_a_vision_transformer():
    torch.manual_seed(0)
    net = VisionTransformer(8, 4, 1, 2, 8, 16, dropout=0.1, attention_dropout=0.1, num_classes=3)
    nn.init.normal_(net.heads.head.weight)
    problem = ZeroLossProblem(net, "mse", torch.randn(3, 3, 8, 8), torch.randn(3, 3))
    assert [site.shape for site in problem.sites] == [(5, 8), (2, 5, 5), (5, 8), (5, 16), (5, 8)]
    check_derivatives(problem, Dropout())


def test_functions_without_forward_derivatives():
    """A function of a user's own, with reverse derivatives alone."""

    class Cube(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    class Layer(nn.Module):
        def forward(self, x):
            return Cube.apply(x)

    torch.manual_seed(0)
    problem = ZeroLossProblem(flat(nn.Linear(20, 16), Layer()), "mse", torch.randn(4, 5, 4), torch.randn(4, 3))
    check_derivatives(problem, Dropout() + LabelNoise(0.1))


class Noisy(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x, self.training)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, training: x + 0.1 * torch.randn_like(x) if training else x,
        lambda x, training: x * (1 + 0.1 * torch.randn(len(x), *(1,) * (x.ndim - 1))) if training else x,
        lambda x, training: x * (1 + 0.1 * torch.randn_like(x)),
        lambda x, training: x * (1 + 0.1 * torch.rand_like(x)) if training else x,
        lambda x, training: x * (2 + 0.1 * torch.randn_like(x)) if training else x,
        lambda x, training: x * (1 + x.abs().mean() * torch.randn_like(x)) if training else x,
        lambda x, training: x * (1 + 0.1 * torch.randn_like(x).abs()) if training else 2 * x,
        lambda x, training: x,
    ],
)
def test_other_noise_is_not_taken_for_multiplicative_gaussian_noise(form):
    before = torch.get_rng_state()
    assert gaussian_std(Noisy(form)) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_multiplicative_gaussian_noise_is_recognised_by_what_it_does():
    assert gaussian_std(GaussianDropout(0.1)) == pytest.approx(1 / 3, rel=1e-4)
    assert gaussian_std(GaussianNoise()) == pytest.approx(0.3, rel=1e-4)
    assert gaussian_std(GaussianDropout(0.0)) is None
    assert gaussian_std(nn.Dropout(0.1)) is None


def test_parts_in_evaluation_mode_drop_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 3))
    f = FunctionalModule(net, dtype=DTYPE)
    assert len(f.sites(randn(2, 5, 4))) == 1
    assert f.normalises_over_batch
    for part in net[2:4]:
        part.eval()
    f = FunctionalModule(net, dtype=DTYPE)
    assert f.sites(randn(2, 5, 4)) == []
    assert not f.normalises_over_batch
    assert len(FunctionalModule(net.eval(), dtype=DTYPE).sites(randn(2, 5, 4))) == 1  # nothing tells them apart


def test_dropout_that_is_not_switched_off_is_found_out():
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(20, 3)

        def forward(self, x):
            return self.last(F.dropout(x.flatten(1), 0.5))

    with pytest.raises(ValueError, match="random in evaluation mode"):
        ZeroLossProblem(Always(), "mse", torch.randn(4, 5, 4), torch.randn(4, 3))


@pytest.mark.parametrize("more", ["training", "evaluation"])
@pytest.mark.parametrize("first", [True, False])
def test_dropout_that_is_called_in_one_mode_alone_is_no_site(more, first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(20, 3)

        def forward(self, x):
            x = x.flatten(1)
            if first:
                x = F.dropout(x, 0.5, training=self.training)
            if self.training == (more == "training"):
                x = F.dropout(x, 0.5, training=self.training)
            return self.last(x)

    problem = ZeroLossProblem(Net(), "mse", torch.randn(4, 5, 4), torch.randn(4, 3))
    assert problem.sites == []
    assert problem.function.is_random(problem.inputs, training=True) == (first or more == "training")


def test_samples_that_cannot_be_told_apart():
    net = Folded(lambda x: x + x.flip(0), lambda h, n: h)
    with pytest.raises(ValueError, match=r"could not be told apart in the activation .* of drop"):
        ZeroLossProblem(net, "mse", torch.randn(4, 5, 4), torch.randn(4, 3))


def test_alpha_dropout_is_no_site():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(20, 3)

        def forward(self, x):
            return self.last(F.alpha_dropout(x.flatten(1), 0.5, training=self.training))

    problem = ZeroLossProblem(Net(), "mse", torch.randn(4, 5, 4), torch.randn(4, 3))
    assert problem.sites == []
    assert problem.function.is_random(problem.inputs, training=True)


def test_what_has_no_outputs_is_refused():
    with pytest.raises(ValueError, match="or an object that has one as its logits, got dict"):
        ZeroLossProblem(Logits(lambda f: {"a": f, "b": f}), "mse", torch.randn(4, 5, 4), torch.randn(4, 3))
