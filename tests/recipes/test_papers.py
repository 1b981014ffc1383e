"""What each paper's method computes, against the literal mathematics: BeamLoRA, DiffoRA, Dynamic LoRA, GeLoRA, MTL."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from recipe_models import (
    K,
    Model,
    adapted_weights,
    equal,
    loss_of,
    optimizer_of,
    ours,
    plain,
    train,
    values,
)  # fmt: skip
from torch import nn

import glora_kernels as gk
from glora_kernels.methods.factors import low_rank
from glora_kernels.recipes import BeamLoRA, DiffoRA, DynamicLoRA, MTLLoRA, gelora

WIDE = torch.float64
PLANTED = "layers.1.v_proj"


def learned(model, seed=5):
    """Factors that are not those of a fresh adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own in low_rank(model, "the test").values():
            for factor in (own.up, own.down):
                p = factor.parameter
                p.copy_(torch.randn(p.shape, generator=generator, dtype=WIDE) / 4)
    return model


def teacher_loss(rank):
    """Of a model whose planted layer has to learn a change of this rank, on the data of a step."""
    teacher = plain(dtype=WIDE)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        up, down = (torch.randn(K, rank, generator=generator, dtype=WIDE) for _ in range(2))
        teacher.get_submodule(PLANTED).weight.add_(up @ down.t() / math.sqrt(rank) / 2)

    def loss(model, step):
        x = torch.randn(32, K, generator=torch.Generator().manual_seed(step), dtype=WIDE)
        return F.mse_loss(model.features(x), teacher.features(x).detach())

    return loss


# BeamLoRA


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_beamlora_at_z_0_is_lora_exactly(rank):
    model, lora = learned(ours(rank)), learned(ours(rank))
    BeamLoRA(model, steps=10)
    for own, mid in zip(low_rank(model, "the test").values(), gk.mids(model).values(), strict=True):
        assert not mid.z.any()
        mid.z.requires_grad_(False)
        assert own.down.parameter.requires_grad
    steps = range(4)
    assert train(model, None, optimizer_of(model), steps) == train(lora, None, optimizer_of(lora), steps)


def beam(dtype=torch.float32, **options):
    """After three steps of four, and the optimizer's fourth, with gains that are apart."""
    model = learned(ours(4, dtype=dtype))
    recipe = BeamLoRA(model, **({"steps": 12, "period": 4, "pruned": 0.9, "horizon": 100, "seed": 3} | options))
    with torch.no_grad():
        for i, mid in enumerate(recipe.gains.values()):
            mid.z.copy_(torch.randn(4, generator=torch.Generator().manual_seed(i)) / 20)
    optimizer = optimizer_of(model)
    recipe.bind(optimizer)
    return model, recipe, optimizer


def moments(optimizer, parameter):
    state = optimizer.state[parameter]
    return [parameter.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()]


def test_beamlora_puts_snapshots_of_winners_in_the_places_of_losers():
    model, recipe, optimizer = beam()
    factors = {path: (own.down.parameter, own.up.parameter) for path, own in low_rank(model, "the test").items()}

    def seen():
        return {path: [moments(optimizer, p) for p in pair] for path, pair in factors.items()}

    train(model, recipe, optimizer, range(2))
    snapshot = seen()
    train(model, recipe, optimizer, [2])
    train(model, None, optimizer, [3])
    before = seen()
    z_before = {path: moments(optimizer, mid.z) for path, mid in recipe.gains.items()}
    pruned = pruned_literally(
        {path: z[0] for path, z in z_before.items()}, 1 - 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 100)), 0.05
    )
    recipe.after_step()
    after = seen()
    copies = 0
    for path, losers in pruned.items():
        z, *z_moments = z_before[path]
        top = z.argsort(descending=True)[: len(losers)].tolist()
        winners = {}
        for i in range(4):
            own = [[part.select(dim, i) for part in after[path][dim]] for dim in (0, 1)]
            if i not in losers:
                source = before
                j = i
            else:
                source = snapshot
                j = next(w for w in top if torch.equal(own[0][0], snapshot[path][0][0][w]))
                winners[i] = j
                copies += 1
            for dim in (0, 1):
                for part, expected in zip(own[dim], source[path][dim], strict=True):
                    assert torch.equal(part, expected.select(dim, j)), (path, i, dim)
        assert sorted(winners.values()) == sorted(top), "each of the strongest is copied once"
        expected = [z.clone(), *(m.clone() for m in z_moments)]
        for loser, winner in winners.items():
            expected[0][[loser, winner]] = (z[loser] + z[winner]) / 2
            for moment in expected[1:]:
                moment[[loser, winner]] = 0
        got = moments(optimizer, recipe.gains[path].z)
        assert all(torch.allclose(one, other, rtol=1e-6, atol=0) for one, other in zip(got, expected, strict=True))
    assert copies >= 4
    assert all(torch.isfinite(torch.tensor(train(model, recipe, optimizer, range(4, 8)))))


def pruned_literally(z, kept, temperature):
    """The ranks after the first place where the running sum of the sorted gains is above p·(all ranks)."""
    gains = {
        (path, r): float(len(own) * math.exp(v / temperature) / sum(math.exp(u / temperature) for u in own.tolist()))
        for path, own in z.items()
        for r, v in enumerate(own.tolist())
    }
    order = sorted(gains, key=lambda key: -gains[key])
    place = next(
        (i for i in range(len(order)) if sum(gains[k] for k in order[: i + 1]) > kept * len(order)), len(order)
    )
    found = {}
    for path, r in order[place:]:
        found.setdefault(path, []).append(r)
    return {path: ranks[-(len(z[path]) // 2) :] for path, ranks in found.items()}  # the cap: the weakest half


@pytest.mark.parametrize("kept", [0.3, 0.8, 0.95, 0.999])
def test_beamlora_prunes_by_the_rule(kept):
    _, recipe, _ = beam()
    z = {path: mid.z.detach() for path, mid in recipe.gains.items()}
    expected = pruned_literally(z, kept, 0.05)
    assert expected
    assert recipe.weakest(kept) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beamlora_with_p_1_changes_nothing(dtype):
    runs = []
    for acts in (True, False):
        model, recipe, optimizer = beam(dtype, pruned=0.0)
        train(model, recipe if acts else None, optimizer, range(12))
        runs.append(values(model))
        assert all(torch.isfinite(value).all() for value in runs[-1].values())
    assert equal(*runs)


def test_beamlora_shares_fall_by_a_cosine():
    recipe = BeamLoRA(ours(), steps=10, pruned=0.05, horizon=1000)
    for step, expected in ((0, 0.95), (500, 0.975), (1000, 1.0), (5000, 1.0)):
        recipe.step = step
        assert recipe.share_kept() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_beamlora_with_equal_gains_or_none_at_all_stays_whole(value):
    _, recipe, _ = beam()
    with torch.no_grad():
        for mid in recipe.gains.values():
            mid.z.fill_(value)
    pruned = recipe.weakest(0.5)
    assert all(len(ranks) <= 2 for ranks in pruned.values())
    assert bool(pruned) == (value == 0.0), "NaN ranks nothing"


def test_beamlora_merges_its_gains():
    model, recipe, optimizer = beam()
    train(model, recipe, optimizer, range(3))
    expected = {}
    for path, own in low_rank(model, "the test").items():
        g = 4 * torch.softmax(recipe.gains[path].z.detach().double() / 0.05, 0)
        down = g[:, None] * own.down.parameter.detach().double()
        expected[path] = own.layer.weight.double() + 2 * own.up.parameter.detach().double() @ down
    recipe.finish()
    gk.merge(model.eval())
    for path, weight in expected.items():
        assert torch.allclose(model.get_submodule(path).weight.double(), weight, rtol=0, atol=1e-6)


# DiffoRA


def test_diffora_selects_the_layer_that_has_to_change():
    loss = teacher_loss(rank=2)
    model = ours(dtype=WIDE)
    recipe = DiffoRA(model, held_out=lambda: loss(model, 10_000 + recipe.step))
    optimizer = optimizer_of(model, weight_decay=0.0, lr=5e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        recipe.after_step()
    gates = recipe.gate_values()
    assert max(gates, key=gates.get) == PLANTED, gates
    assert PLANTED in recipe.chosen(share=1 / 3)
    assert [path.rpartition(".")[2] for path in recipe.chosen(share=1 / 3)].count("v_proj") == 1
    assert recipe.chosen(share=1.0) == list(gates)
    fresh = gk.inject(plain(), gk.GLoRAConfig.lora(4, 8), recipe.chosen(share=1 / 3))
    assert set(low_rank(fresh, "the test")) == set(recipe.chosen(share=1 / 3))


def test_a_gate_takes_an_adam_step_on_the_held_out_loss():
    model = learned(ours(dtype=WIDE))
    recipe = DiffoRA(model, held_out=lambda: loss_of(model, 77), lr=0.125)
    before = values(model)
    gradient = []
    for a in recipe.parameters:
        found = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                a.add_(step)
                found.append(float(loss_of(model, 77)))
                a.sub_(step)
        gradient.append((found[0] - found[1]) / 2e-5)
    recipe.after_step()
    for a, slope in zip(recipe.parameters, gradient, strict=True):  # Adam's first step: lr·g/(|g| + eps)
        assert float(a.detach()) == pytest.approx(-0.125 * slope / (abs(slope) + 1e-8), rel=1e-4)
    after = values(model)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith(".a"))
    assert not any(a.requires_grad or a.grad is not None for a in recipe.parameters)


# Dynamic LoRA


def ranks_of(model):
    return {path: own.rank for path, own in low_rank(model, "the test").items()}


def test_dynamic_lora_moves_ranks_to_the_layer_that_has_to_change():
    loss = teacher_loss(rank=8)
    model = ours(dtype=WIDE)
    recipe = DynamicLoRA(model, period=10)
    optimizer = optimizer_of(model, weight_decay=0.0, lr=5e-3)
    recipe.bind(optimizer)
    for step in range(60):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        recipe.after_step()
        assert sum(ranks_of(model).values()) == 24, "the budget, exactly"
        assert all(1 <= rank <= 8 for rank in ranks_of(model).values())
    ranks = ranks_of(model)
    assert ranks[PLANTED] > 4
    assert ranks[PLANTED] == max(ranks.values()), ranks


def test_dynamic_lora_scores_are_a_running_mean_of_sensitivities():
    model = learned(ours(dtype=WIDE))
    recipe = DynamicLoRA(model, period=100, decay=0.75)
    with pytest.raises(RuntimeError, match=r"DynamicLoRA .* call bind\(optimizer\) first"):
        recipe.after_step()
    optimizer = optimizer_of(model)
    recipe.bind(optimizer)
    expected = dict.fromkeys(recipe.scores, 0.0)
    for step in range(3):
        loss_of(model, step).backward()
        for path, own in low_rank(model, "the test").items():
            now = sum(float((f.parameter.detach() * f.parameter.grad).abs().sum()) for f in own.factors())
            expected[path] = 0.75 * expected[path] + 0.25 * now
        optimizer.step()
        optimizer.zero_grad()
        recipe.after_step()
    assert recipe.scores == pytest.approx(expected, rel=1e-5)


def test_growth_leaves_the_function_and_loss_takes_the_weakest_ranks():
    model = learned(ours(dtype=WIDE))
    recipe = DynamicLoRA(model)
    own = low_rank(model, "the test")
    recipe.scores = {path: 1.0 + i for i, path in enumerate(own)}
    before = adapted_weights(model)
    parts = {
        path: 2 * torch.einsum("nr,rk->rnk", one.up.value.detach(), one.down.value.detach())
        for path, one in own.items()
    }
    ranks = recipe.reallocate()
    assert sum(ranks.values()) == 24
    assert ranks == ranks_of(model)
    after = adapted_weights(model)
    for path, rank in ranks.items():
        norms = [float(part.norm()) for part in parts[path]]
        strongest = sorted(range(4), key=lambda r: -norms[r])[:rank]
        expected = own[path].layer.weight.detach() + parts[path][sorted(strongest)].sum(0)
        assert torch.allclose(after[path], expected, rtol=0, atol=1e-12), path
        if rank >= 4:
            assert torch.allclose(after[path], before[path], rtol=0, atol=1e-14), path
    assert {rank > 4 for rank in ranks.values()} == {True, False}


def test_dynamic_lora_passes_over_gradients_that_are_not_finite_and_scores_that_say_nothing():
    model = ours()
    recipe = DynamicLoRA(model, period=1)
    optimizer = optimizer_of(model)
    recipe.bind(optimizer)
    train(model, recipe, optimizer, [0])  # U was 0, and D had no gradient: all scores are 0
    assert set(recipe.scores.values()) == {0.0}
    assert set(ranks_of(model).values()) == {4}
    train(model, recipe, optimizer, [1, 2])
    scores = dict(recipe.scores)
    assert any(scores.values())
    (loss_of(model, 3) * math.inf).backward()  # what a gradient scaler skips
    optimizer.zero_grad()
    recipe.after_step()
    assert recipe.scores == scores
    recipe.scores = dict.fromkeys(scores, 2.0)
    recipe.period = 10**6
    recipe.reallocate()
    assert set(ranks_of(model).values()) == {4}, "equal scores give equal ranks"
    with pytest.raises(ValueError, match="budget=24"):
        DynamicLoRA(ours(), low=5)


# GeLoRA


class Manifold(nn.Module):
    """A block whose output lies on a manifold of a known dimension, whatever it is given."""

    def __init__(self, dimension, seed):
        super().__init__()
        self.q_proj = nn.Linear(K, K)
        self.register_buffer("points", points(dimension, seed))

    def forward(self, x):
        return self.points + 0 * self.q_proj(x)


def points(dimension, seed, count=1500):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, dimension, generator=generator)
    basis = torch.linalg.qr(torch.randn(K, K, generator=generator)).Q[:dimension]
    return torch.cat([low[:, :1].sin(), low[:, 1:]], 1) @ basis


def test_gelora_ranks_by_how_far_dimensions_grow():
    pytest.importorskip("skdim")
    model = Model()
    model.layers = nn.ModuleList([Manifold(4, 1), Manifold(2, 2), Manifold(3, 3)])
    model.train()
    ranks = gelora(model, [points(1, 0)], target_modules=["q_proj"])
    known = [1, 4, 2, 3]
    assert list(ranks.values()) == [max(b - a, 0) + 1 for a, b in pairwise(known)]
    assert model.training
    layers = low_rank(model, "the test")
    assert {path: own.rank for path, own in layers.items()} == ranks
    assert {own.scale for own in layers.values()} == {2.0}


# MTL-LoRA


def test_mtl_lora_with_the_identity_and_one_up_is_lora_exactly():
    model, lora = learned(ours()), learned(ours())
    MTLLoRA(model, tasks=3, ups=1)
    x = torch.randn(6, K)
    for task in range(3):
        with gk.tasks(model, task):
            assert torch.equal(model(x), lora(x))


def general_mtl():
    model = learned(ours(dtype=WIDE))
    recipe = MTLLoRA(model, tasks=3, ups=2, temperature=0.5)
    with torch.no_grad():
        for own in low_rank(model, "the test").values():
            own.up.parameter.copy_(torch.randn_like(own.up.parameter) / 4)
        for mid in recipe.maps.values():
            mid.lambdas.add_(torch.randn_like(mid.lambdas) / 4)
    return model, recipe


def test_mtl_lora_is_its_equation_and_a_mixed_batch_equals_batches_of_one_task():
    model, recipe = general_mtl()
    x = torch.randn(7, K, dtype=WIDE)
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    expected = torch.empty(7, 5, dtype=WIDE)
    for task in range(3):
        literal = plain(dtype=WIDE)
        for path, own in low_rank(model, "the test").items():
            mid = recipe.maps[path]
            w = torch.exp(mid.theta[task] / 0.5) / torch.exp(mid.theta[task] / 0.5).sum()
            up = w[0] * own.up.parameter[:, :4] + w[1] * own.up.parameter[:, 4:]
            change = 2.0 * up @ mid.lambdas[task] @ own.down.parameter
            literal.get_submodule(path).weight.data += change.detach()
        expected[ids == task] = literal(x[ids == task])
        with gk.tasks(model, task):
            assert torch.allclose(model(x[ids == task]), expected[ids == task], rtol=0, atol=1e-12)
    with gk.tasks(model, ids):
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


def test_a_mixed_step_of_mtl_lora_has_the_gradients_of_the_tasks():
    model, _ = general_mtl()
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, ids = torch.randn(7, K, dtype=WIDE), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    with gk.tasks(model, ids):
        mixed = torch.autograd.grad(model(x).square().sum(), parameters)
    apart = [torch.zeros_like(p) for p in parameters]
    for task in range(3):
        with gk.tasks(model, task):
            found = torch.autograd.grad(model(x[ids == task]).square().sum(), parameters)
        apart = [one + other for one, other in zip(apart, found, strict=True)]
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-11) for one, other in zip(mixed, apart, strict=True))


def test_one_task_of_mtl_lora_is_saved_as_plain_lora(tmp_path):
    model, _ = general_mtl()
    x = torch.randn(4, K, dtype=WIDE)
    with gk.tasks(model, 1):
        expected = model(x).detach()
        gk.save_adapter(model, tmp_path / "task.safetensors")
    again = gk.load_adapter(plain(dtype=WIDE), tmp_path / "task.safetensors")
    assert torch.allclose(again(x), expected, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="which"):
        model(x)
