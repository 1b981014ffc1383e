"""All 432 configurations: against the original implementation's numbers, and against the equation elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Problem, eager, layer, ours, problem, truth

from glora_kernels.reference import effective_bias, effective_weight
from glora_kernels.spec import GLoRAConfig, all_configs

GOLDEN = dict(np.load(Path(__file__).parents[1] / "data" / "glora_432.npz"))
EXACT = 1e-12
RANK, K, N = 4, 12, 7
# By the forms of A and B, 27 configurations each: a test a case would spend its time in pytest.
AB = [(a, b) for a in ("lora", "vector", "constant", "none") for b in ("lora", "vector", "constant", "none")]


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name].copy())


def test_the_file_holds_every_configuration_once():
    names = {tuple(map(str, row)) for row in GOLDEN["configs"]}
    assert names == {(c.A, c.B, c.C, c.D, c.E) for c in all_configs()}
    assert len(GOLDEN["configs"]) == 432


def golden_problem(config: GLoRAConfig, bias: bool) -> Problem:
    """The file's tensors in the library's shapes: a vector is column 0 of `_up`, a constant its element [0,0]."""
    params = {}
    for name, shape in config.parameter_shapes(K, N, bias).items():
        if name in ("D", "E"):
            params[name] = tensor(name)[: shape[0]]
        elif name in ("A", "B", "C"):
            params[name] = tensor(f"{name}_up")[: shape[0], 0]
        else:
            params[name] = tensor(name)
        assert tuple(params[name].shape) == shape
    trained = frozenset(["x", "bias", *params])
    b = tensor("bias") if bias else None
    return Problem(config, tensor("x"), tensor("weight"), b, params, tensor("dy"), None, trained)


def golden_gradient(name: str, shape: torch.Size, at: tuple[int, int]) -> torch.Tensor:
    if name in ("A", "B", "C"):
        return torch.from_numpy(GOLDEN[f"d{name}_up"][at].copy())[: shape[0], 0]
    return torch.from_numpy(GOLDEN[f"d{name}"][at].copy())[: shape[0]]


def assert_near(got: torch.Tensor | None, expected: torch.Tensor, what: str, tolerance: float = EXACT) -> None:
    assert got is not None, what
    assert got.shape == expected.shape, what
    error = float((got - expected).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), f"{what}: {error}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("a", "b"), AB)
def test_golden(a, b, bias):
    """y, dx, every support's gradient, W_eff and the bias, of the operators and of the reference."""
    seen = 0
    for i, row in enumerate(GOLDEN["configs"]):
        if (row[0], row[1]) != (a, b):
            continue
        seen += 1
        at = (0 if bias else 1, i)
        config = GLoRAConfig(*map(str, row), rank=RANK)
        p = golden_problem(config, bias)
        for kind, got in (("ops", ours(p)), ("reference", eager(p))):
            assert_near(got["y"], torch.from_numpy(GOLDEN["y"][at]), f"{kind} y {config}")
            assert_near(got["x"], torch.from_numpy(GOLDEN["dx"][at]), f"{kind} dx {config}")
            for name, value in p.params.items():
                assert_near(got[name], golden_gradient(name, value.shape, at), f"{kind} d{name} {config}")
        weight = effective_weight(p.weight, p.params, config)
        assert_near(weight, torch.from_numpy(GOLDEN["weight_eff"][at]), f"weight_eff {config}")
        total = effective_bias(p.weight, p.bias, p.params, config)
        total = torch.zeros(N, dtype=torch.float64) if total is None else total
        assert_near(total, torch.from_numpy(np.nan_to_num(GOLDEN["bias_eff"][at])), f"bias_eff {config}")
    assert seen == 27


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("a", "b"), AB)
def test_another_shape(a, b, bias):
    """The same for random data of another shape, a scale that is not 1, and the gradient of a trained bias."""
    for i, config in enumerate(all_configs(rank=3)):
        if (config.A, config.B) != (a, b):  # noqa: SIM300
            continue
        alpha = 5.0 if b == "lora" else None
        config = GLoRAConfig(config.A, config.B, config.C, config.D, config.E, rank=3, alpha=alpha)
        assert_literal(problem(config, (3, 3), 20, 11, bias, seed=i))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("b", ["lora", "vector", "constant", "none"])
def test_product_variant(b, bias, dropout):
    for c in ("lora", "vector", "none"):
        for d, e in (("vector", "constant"), ("none", "none")):
            config = GLoRAConfig("lora", b, c, d, e, 3, 5.0 if b == "lora" else None, dropout, "matmul")
            assert_literal(problem(config, (3, 3), 20, 11, bias))


@pytest.mark.parametrize("a", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout_acts_on_the_low_rank_b_path_only(a, p):
    assert_literal(problem(GLoRAConfig(a, "lora", "vector", "vector", "vector", 3, 5.0, p), (3, 13), 20, 11))


def assert_literal(p: Problem) -> None:
    expected = truth(p)[0]
    for kind, got in (("ops", ours(p)), ("reference", eager(p))):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(got[name], value, f"{kind} {name} {p.config}")


def test_reference_matches_the_equation_in_words():
    """Numbers small enough for a pencil: K = N = 1."""
    config = GLoRAConfig("vector", "vector", "vector", "vector", "vector", rank=1)
    one = {name: torch.tensor([v], dtype=torch.float64) for name, v in zip("ABCDE", (2, 3, 5, 7, 11), strict=True)}
    x, w, b = (torch.tensor(v, dtype=torch.float64) for v in ([[13.0]], [[17.0]], [19.0]))
    y = layer(x, w, b, one, config)
    assert y.item() == 13 * (17 + 17 * 2 + 3) + (19 + 19 * 7 + 11 + 17 * 5)
