"""The benchmark's rows measure what they say: each product is the same vector; its file holds the table's numbers."""

import json

import pytest
import torch

from recipes import benchmark


@pytest.mark.filterwarnings("ignore")  # other libraries warn about torch
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18"])
def test_every_product_is_the_same_vector(name):
    build, shape, _ = benchmark.PROBLEMS[name]
    torch.manual_seed(0)
    net = build(shape).double().eval()
    x, y = torch.randn(6, *shape, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    problem = benchmark.ZeroLossProblem(net, "mse", x, y)
    found = {}
    for row, call, _ in benchmark.products(net, problem, x, y):
        if not (name == "resnet18" and row == "Hessian product, curvlinops"):  # GroupNorm: torch has no such derivative
            found[row] = call()
    naive = found["Gauss-Newton product, jvp + vjp"]
    found["Gauss-Newton product, jvp + vjp"] = problem.function.flatten(list(naive.values()))
    reference = found["Gauss-Newton product, cached linearisation"]
    for row, product in found.items():
        if row.startswith("Gauss-Newton"):
            torch.testing.assert_close(product, reference, rtol=1e-9, atol=1e-12)


def test_the_table_and_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_REPEATS", 2)
    benchmark.main(problems="mlp", samples=4, out=tmp_path / "benchmark.json")
    printed = capsys.readouterr().out
    assert "| gradient |" in printed
    written = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {row["name"]: row["seconds"] for row in written["mlp"]["rows"]}
    assert all(seconds > 0 for seconds in rows.values())
    assert f"| Hessian product | {rows['Hessian product']:.3g} |" in printed


@pytest.mark.filterwarnings("ignore")
def test_the_cost_of_paths_is_in_training_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_WINDOW", 12)
    monkeypatch.setattr(benchmark, "_REPEATS", 2)
    benchmark.main(problems="mlp", samples=8, paths=True, out=tmp_path / "benchmark.json")
    row = json.loads((tmp_path / "benchmark.json").read_text())["paths"]["mlp"]
    assert row["ratio"] == pytest.approx(row["with"] / row["without"] - 1)
    assert row["ratio"] > 1  # six gradients beside one
    assert f"a step of all paths: {row['ratio']:.2f} training steps" in capsys.readouterr().out
