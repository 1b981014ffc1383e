"""What each paper's method computes, against the literal mathematics: XGBLoRA, chains, PRILoRA, RITE, LoRA Recycle."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recipe_models import (
    MODELS,
    TARGETS,
    K,
    adapted_weights,
    equal,
    four_bit,
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
from glora_kernels.recipes import (
    ChainOfLoRA,
    PRILoRA,
    XGBLoRA,
    inject_prilora,
    invert,
    lora_rite,
    prototype_logits,
    recycle,
)  # fmt: skip

WIDE = torch.float64


def change_of(own):
    """s·U·D of the adapter that trains now."""
    return own.scale * own.up.parameter.detach().double() @ own.down.parameter.detach().double()


# XGBLoRA


@pytest.mark.parametrize("into", ["base", "chain"])
def test_xgblora_adds_up_its_boosters(into):
    model = ours(1, depth=4, dtype=WIDE)
    recipe = XGBLoRA(model, layers=2, steps=3, into=into, seed=2)
    optimizer = optimizer_of(model, recipe, weight_decay=0.1)
    recipe.bind(optimizer)
    start, untouched, boosters = adapted_weights(model), values(model), 3
    sums = {path: torch.zeros(K, K, dtype=WIDE) for path in start}
    ever = set()
    for step in range(3 * boosters):
        chosen = list(recipe.chosen)
        assert len(chosen) == 2
        ever |= set(chosen)
        trained = {path for path, own in low_rank(model, "the test").items() if own.up.parameter.requires_grad}
        assert trained == set(chosen)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        layers = low_rank(model, "the test")
        if step % 3 == 2:
            for path in chosen:
                sums[path] += change_of(layers[path])
            before = loss_of(model, 99)
        recipe.after_step()
        if step % 3 == 2:
            assert torch.allclose(loss_of(model, 99), before, rtol=0, atol=1e-12), "a merge changes no output"
    assert recipe.booster == boosters
    for path, after in adapted_weights(model).items():
        change = after - start[path]
        assert torch.allclose(change, sums[path], rtol=0, atol=1e-12)
        assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) <= boosters
    never = set(start) - ever
    assert never
    assert any(sums[path].norm() > 1e-3 for path in ever)
    now = values(model)
    for name, value in untouched.items():
        if name.rpartition(".")[0] in never:
            assert torch.equal(now[name], value), "also under weight_decay"


def test_xgblora_draws_by_its_seed_and_says_what_the_optimizer_lacks():
    draws = [[XGBLoRA(ours(1), layers=2, seed=seed).choose() for seed in (0, 1, 2, 3)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len({tuple(own) for own in draws[0]}) > 1
    recipe = XGBLoRA(ours(1), layers=2)
    with pytest.raises(ValueError, match=r"recipe\.parameters"):
        recipe.bind(optimizer_of(recipe.model))
    assert len(recipe.parameters()) == 12
    with pytest.raises(ValueError, match="from 1 to 6"):
        XGBLoRA(ours(1))


# Chain of LoRA


@pytest.mark.parametrize(("into", "kind"), [("base", "ours"), ("chain", "ours"), ("base", "accelerated")])
def test_a_chain_adds_up_its_links(into, kind):
    model = ours(4, dtype=WIDE) if kind == "ours" else MODELS[kind]().double()
    start = adapted_weights(model)
    ranks = [4, 2, 1]
    recipe = ChainOfLoRA(model, knots=[3, 6], ranks=ranks, into=into)
    optimizer = optimizer_of(model)
    recipe.bind(optimizer)
    sums = {path: torch.zeros(K, K, dtype=WIDE) for path in start}
    for step in range(1, 9):
        train(model, None, optimizer, [step])
        layers = low_rank(model, "the test")
        assert {len(own.down.parameter) for own in layers.values()} == {ranks[(step - 1) // 3]}
        at_knot = step in (3, 6)
        if at_knot:
            for path, own in layers.items():
                sums[path] += change_of(own)
            before = loss_of(model, 99)
        recipe.after_step()
        if at_knot:
            assert torch.allclose(loss_of(model, 99), before, rtol=0, atol=1e-12), "the output does not jump"
            for own in low_rank(model, "the test").values():
                assert not own.up.parameter.any()
                assert own.down.parameter.any()
                assert not any(f.parameter in optimizer.state for f in own.factors()), "moments are empty"
    assert recipe.links == 3
    layers = low_rank(model, "the test")
    for path, after in adapted_weights(model).items():
        change = after - start[path]
        assert torch.allclose(change, sums[path] + change_of(layers[path]), rtol=0, atol=1e-12)
        assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) == sum(ranks), "the ranks add up"
        assert layers[path].rank == (sum(ranks) if into == "chain" else ranks[-1])


def test_a_chain_goes_where_the_base_keeps_it():
    for model, expected in ((ours(), 0), (four_bit(), 6)):
        recipe = ChainOfLoRA(model, knots=[2])
        optimizer = optimizer_of(model)
        recipe.bind(optimizer)
        train(model, recipe, optimizer, range(3))
        layers = low_rank(model, "the test").values()
        assert sum(own.rank == 8 for own in layers) == expected


@pytest.mark.parametrize("options", [
    {"knots": [3, 2]}, {"knots": [0]}, {"knots": [2.0]}, {"knots": [2], "ranks": [4]}, {"knots": [2], "ranks": [4, 0]},
])  # fmt: skip
def test_a_chain_that_cannot_be_is_refused_at_once(options):
    model = ours()
    with pytest.raises(ValueError, match=r"knots|ranks"):
        ChainOfLoRA(model, **options)
    assert equal(values(model), values(ours()))


# PRILoRA


def test_prilora_ranks_rise_by_depth():
    model = plain(depth=12)
    ranks = inject_prilora(model, 4, 12, target_modules=["q_proj"])
    exact = [int(np.floor(4 + 8 * layer / 11 + 0.5)) for layer in range(12)]
    assert exact == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    assert ranks == {f"layers.{layer}.q_proj": rank for layer, rank in enumerate(exact)}
    layers = low_rank(model, "the test")
    assert {path: len(own.down.parameter) for path, own in layers.items()} == ranks
    assert {own.scale for own in layers.values()} == {2.0}


def test_prilora_zeroes_exactly_what_matters_least():
    model = ours(dtype=WIDE)
    recipe = PRILoRA(model, period=3, pruned=0.4, decay=0.75)
    optimizer = optimizer_of(model)
    recipe.bind(optimizer)
    inputs = {path: [] for path in low_rank(model, "the test")}
    for path, rows in inputs.items():
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, rows=rows: rows.append(args[0].detach()))
    means = {}
    for step in range(1, 7):
        for rows in inputs.values():
            rows.clear()
        for part in (2 * step, 2 * step + 1):  # two micro-batches
            loss_of(model, part).backward()
        seen = {path: np.abs(torch.cat(rows).numpy()).mean(0) for path, rows in inputs.items()}
        with torch.no_grad():
            loss_of(model, 5000)  # validation does not count
        optimizer.step()
        optimizer.zero_grad()
        means = {path: 0.75 * means[path] + 0.25 * own if path in means else own for path, own in seen.items()}
        downs = {path: own.down.parameter.detach().clone() for path, own in low_rank(model, "the test").items()}
        recipe.after_step()
        for path, own in low_rank(model, "the test").items():
            assert np.allclose(recipe.means[path].numpy(), means[path], rtol=1e-5)
            before, after = downs[path].numpy(), own.down.parameter.detach().numpy()
            expected = before.copy()
            if step % 3 == 0:
                for row in expected:
                    row[np.argsort(np.abs(row) * means[path], kind="stable")[: int(0.4 * K)]] = 0.0
                assert ((after == 0).sum(1) == int(0.4 * K)).all()
            assert np.array_equal(after, expected)
    train(model, recipe, optimizer, [7])
    assert all(own.down.parameter.all() for own in low_rank(model, "the test").values()), "zeros train on"


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_prilora_with_means_that_rank_nothing_zeroes_as_many(value):
    model = ours()
    recipe = PRILoRA(model)
    recipe.means = {path: torch.full((K,), value) for path in low_rank(model, "the test")}
    recipe.prune()
    for own in low_rank(model, "the test").values():
        assert ((own.down.parameter == 0).sum(1) == K // 2).all()
        assert own.down.parameter.isfinite().all()


def test_prilora_says_where_it_sees_nothing():
    model = ours()
    recipe = PRILoRA(plain_copy := ours(), period=1)
    optimizer = optimizer_of(model)
    loss_of(model, 0).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="has seen no input"):
        recipe.after_step()
    assert equal(values(plain_copy), values(ours()))


# LoRA-RITE


def test_lora_rite_does_not_depend_on_the_factors():
    pytest.importorskip("pytorch_optimizer")
    runs = []
    for rewritten in (False, True):
        model = ours(dtype=WIDE)
        with torch.no_grad():
            for i, own in enumerate(low_rank(model, "the test").values()):
                generator = torch.Generator().manual_seed(i)
                own.up.parameter.copy_(torch.randn(K, 4, generator=generator, dtype=WIDE) / 4)
                basis = torch.randn(4, 4, generator=generator, dtype=WIDE) + 3 * torch.eye(4, dtype=WIDE)
                if rewritten:
                    own.up.parameter.copy_(own.up.parameter @ basis)
                    own.down.parameter.copy_(torch.linalg.solve(basis, own.down.parameter))
        start = adapted_weights(model)
        optimizer = lora_rite(model, lr=1e-2)
        train(model, None, optimizer, range(10))
        runs.append({path: after - start[path] for path, after in adapted_weights(model).items()})
    for path, change in runs[0].items():
        assert change.norm() > 1e-2
        assert torch.allclose(change, runs[1][path], rtol=0, atol=1e-9), path


# LoRA Recycle


class Images(nn.Module):
    """Images (n, 2, 8) → 4 classes, with batch statistics that a call in training mode would change."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(K, K), nn.Linear(K, K)
        self.norm, self.head = nn.BatchNorm1d(K), nn.Linear(K, 4)

    def features(self, x):
        return self.norm(torch.tanh(self.q_proj(x.flatten(1))) + self.v_proj(x.flatten(1)))

    def forward(self, x):
        return self.head(self.features(x))


def images_model(dtype=torch.float32):
    torch.manual_seed(3)
    return gk.inject(Images().to(dtype), gk.GLoRAConfig.lora(4, 8, dropout=0.5), TARGETS, train=["head"])


@pytest.fixture
def teachers(tmp_path):
    """Adapters with heads that were trained on two tasks."""
    paths = []
    for seed in (0, 1):
        model = images_model()
        target = torch.randn(K, 4, generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
        for step in range(20):
            x = torch.randn(32, 2, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model.eval()(x), (x.flatten(1) @ target).argmax(1)).backward()
            optimizer.step()
        paths.append(tmp_path / f"{seed}.safetensors")
        gk.save_adapter(model, paths[-1])
    return paths


def features(model, x):
    return model.features(x)


def test_recycle_learns_from_images_of_its_own_and_changes_the_student_alone(teachers):
    model = images_model()
    model.norm.eval()
    before, files = values(model), [path.read_bytes() for path in teachers]
    data = [invert(model, path, classes=4, shape=(2, 8), per_class=4, steps=30, seed=1) for path in teachers]
    assert equal(values(model), before)
    assert all(p.grad is None for p in model.parameters())
    for one, path in zip(data, teachers, strict=True):
        noise = invert(model, path, classes=4, shape=(2, 8), per_class=4, steps=0, seed=1)
        assert one.labels.tolist() == [c for c in range(4) for _ in range(4)]
        with gk.using(model.eval(), path), torch.no_grad():
            entropies = [float(F.cross_entropy(model(images), one.labels)) for images in (noise.images, one.images)]
        assert entropies[1] < 0.2 * entropies[0]
    model.train()
    model.norm.eval()
    losses = recycle(model, features, data, steps=40, ways=3, shots=1, lr=1e-2, progress=False)
    idle = recycle(images_model(), features, data, steps=40, ways=3, shots=1, lr=0.0, progress=False)
    assert len(losses) == 40
    assert losses[0] == idle[0]
    assert sum(losses[-20:]) < 0.7 * sum(idle[-20:]), "the same tasks, learned or not"
    after = values(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{layer}.B_{part}" for layer in TARGETS for part in ("up", "down")}
    assert [path.read_bytes() for path in teachers] == files
    assert model.training
    assert not model.norm.training
    assert all(p.grad is None for p in model.parameters())


def test_a_student_that_is_the_teacher_has_no_divergence(teachers):
    model = images_model()
    data = [invert(model, teachers[0], classes=4, shape=(2, 8), per_class=3, steps=2)]
    gk.load_adapter(model, teachers[0])
    assert recycle(model, features, data, steps=1, mixed=0.0, progress=False) == [0.0]


def test_prototype_logits_are_negative_squared_distances():
    support, queries = torch.randn(6, 3, dtype=WIDE), torch.randn(4, 3, dtype=WIDE)
    labels = torch.tensor([0, 1, 1, 0, 1, 1])
    found = prototype_logits(support, labels, queries, 2)
    for q in range(4):
        for c in range(2):
            centre = support[labels == c].mean(0)
            assert float(found[q, c]) == pytest.approx(-float(((queries[q] - centre) ** 2).sum()), rel=1e-12)


def test_invert_takes_a_regularizer_and_the_dtype_of_the_model(teachers, tmp_path):
    model = images_model()
    sizes = [
        invert(
            model, teachers[0], 4, (2, 8), 2, 20, regularizer=lambda x: x.square().mean(), weight=weight
        ).images.norm() for weight in (0.0, 100.0)
    ]  # fmt: skip
    assert sizes[1] < 0.7 * sizes[0]
    wide = images_model(WIDE)
    gk.save_adapter(wide, tmp_path / "wide.safetensors")
    assert invert(wide, tmp_path / "wide.safetensors", 4, (2, 8), 1, 1).images.dtype == WIDE


def test_an_error_in_the_middle_leaves_the_model_as_it_was(teachers):
    model = images_model()
    before = values(model)

    def fail(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(model, teachers[0], 4, (2, 8), 1, 1, regularizer=fail)
    assert equal(values(model), before)
    assert model.training


def test_recycle_refuses_what_it_cannot_draw(teachers):
    model = images_model()
    one = invert(model, teachers[0], 4, (2, 8), 2, 0)
    for options, reason in (
        ({}, "two or more"),
        ({"ways": 5, "mixed": 0}, "ways=5"),
        ({"shots": 2, "mixed": 0}, "shots=2"),
    ):
        with pytest.raises(ValueError, match=reason):
            recycle(model, features, [one], **options)
