"""A group of layers as one call: values and gradients by the letter in float64, structures, memory, errors."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from groups import CASES, Group, build
from torch._subclasses.fake_tensor import FakeTensorMode

from glora_kernels.grouped.group import ABSENT, Operands
from glora_kernels.grouped.group import Group as Indices
from glora_kernels.grouped.op import MAX_MEMBERS
from glora_kernels.ops import glora_linear, grouped_lora_linear
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime.routes import backend

OPS = torch.ops.glora_kernels
pytestmark = pytest.mark.usefixtures("poison")
cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@cases
def test_values_and_gradients(make, dropout):
    group = make(dropout=dropout)
    group.check(group.ours(), torch.float64)


def test_as_many_members_as_one_call_takes():
    sizes = [1 + i % 7 for i in range(MAX_MEMBERS)]
    group = build(sizes, lead=(3,), k=8, rank=[1 + i % 3 for i in range(MAX_MEMBERS)], dropout=0.25)
    group.check(group.ours(), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@cases
def test_bit_for_bit_what_the_layers_give_one_by_one(make, dropout, dtype):
    """The arithmetic of y is that of a single layer; so is that of a gradient to which one member adds."""
    group = make(dropout=dropout, dtype=dtype)
    with backend("eager"):
        alone = group.results(group.loop(), group.leaves())
    together = group.ours()
    for i in range(group.size):
        assert torch.equal(together[f"y[{i}]"], alone[f"y[{i}]"]), i
    for name, leaf in group.leaves().items():
        users = sum(leaf is t for tensors in (group.xs, group.downs, group.ups, group.biases) for t in tensors)
        if users == 1:
            assert torch.equal(together[name], alone[name]), name


def test_every_subset_of_gradients():
    """Each subset gets what the letter gives, the rest nothing."""
    names = CASES["partly tied"]().leaves().keys()
    assert len(names) == 9
    chosen = ["xs[0]", "downs[0]", "downs[2]", "ups[1]", "biases[0]", "biases[2]"]
    for size in range(len(chosen) + 1):
        for subset in itertools.combinations(chosen, size):
            group = CASES["partly tied"](lead=(5,), k=12, dropout=0.25).freeze(subset)
            assert list(group.leaves()) == list(subset)
            group.check(group.ours(), torch.float64)
            assert all(t.grad is None for t in group.weights)


def test_gradcheck():
    group = build((3, 2), lead=(2,), k=4, rank=1, dropout=0.25)
    leaves = group.leaves()

    def function(x, down_0, down_1, up_0, up_1, bias_0, bias_1):
        return tuple(grouped_lora_linear(
            x, group.weights, [down_0, down_1], [up_0, up_1], [bias_0, bias_1], scales=group.scales, dropout_p=0.25,
            seeds=group.seeds,
        ))  # fmt: skip

    with backend("eager"):
        assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_a_single_entry_is_shared_by_all():
    """An operand given once and a list of the same object are one call; numbers of members come from any sequence."""
    group = CASES["tied"](dropout=0.25)
    expected = group.ours()
    ys = grouped_lora_linear(
        group.xs[0], torch.nn.ParameterList([torch.nn.Parameter(w, requires_grad=False) for w in group.weights]),
        group.downs[0], tuple(group.ups), group.biases, scales=0.5, dropout_p=0.25, seeds=group.seeds[0],
    )  # fmt: skip
    for name, value in group.results(ys, group.leaves()).items():
        assert torch.equal(value, expected[name]), name
    assert len(grouped_lora_linear(group.xs[0], group.weights[0])) == 1


# Few bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["own", "tied", "one down", "W, up and bias shared", "without", "strided"])
def test_in_few_bits(name, dtype):
    group = CASES[name](dropout=0.25, dtype=dtype)
    group.check(group.ours(), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["own", "partly tied"])
def test_adapters_in_fp32_over_16_bits(name, dtype):
    """Their gradients come in fp32 too; so does that of an fp32 bias, beside one in 16 bits."""
    group = CASES[name](dtype=dtype, adapters=torch.float32, size=0.05)
    group.biases[0] = group.biases[0].detach().float().requires_grad_()
    group.check(group.ours(), dtype)


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_a_bias_of_any_dtype(dtype, other):
    """Beside a pair and alone; its gradient is rounded to its own dtype."""
    for name in ("own", "bases alone"):
        group = CASES[name](dtype=dtype)
        group.biases[0] = group.biases[0].detach().to(other).requires_grad_()
        got, truth = group.ours(), group.literal(torch.float64)
        assert got["biases[0]"].dtype == other
        exact = truth["biases[0]"]
        assert largest_error(got["biases[0]"], exact) <= allowed_error(exact, exact.to(other), other)
        assert largest_error(got["y[0]"], truth["y[0]"]) <= allowed_error(
            truth["y[0]"], group.literal(dtype)["y[0]"], dtype
        )


def test_autocast():
    """fp32 x, W, factors and biases under bf16 autocast: y in bf16, every gradient in fp32; float64 stays as it is."""
    for name in ("own", "tied", "without"):
        group = CASES[name](dtype=torch.float32, size=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            together, alone = group.call(), group.loop()
        for one, other in zip(together, alone, strict=True):
            assert one.dtype == torch.bfloat16
            assert torch.equal(one, other)
        got = group.results(together, group.leaves())
        group.check(got, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            exact = CASES[name]().ours()
        assert exact["y[0]"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
@pytest.mark.parametrize("shared", [True, False])
def test_small_adapters_survive_16_bits(shared, size, dtype):
    """‖(got - base) - Δ‖/‖Δ‖ of y and dx, with the exact change Δ, is no worse than that of the layers one by one."""
    lead = (256,) if shared else [(256,), (255,)]
    group = build((64, 64), lead=lead, k=64, rank=4, dtype=dtype)
    with torch.no_grad():
        for factor in (*group.downs, *group.ups):
            factor.copy_(factor.sign() * (size / 2) ** 0.5)
    group.biases, group.scales = [None, None], [1.0, 1.0]
    base = Group(group.xs, group.weights, [None, None], [None, None], group.biases, group.scales, 0.0, group.seeds,
                 group.dys)  # fmt: skip
    exact, exact_base = group.literal(torch.float64), base.literal(torch.float64)
    lost = []
    with backend("eager"):
        for call in (Group.call, Group.loop):
            got, got_base = (g.results(call(g), g.leaves()) for g in (group, base))
            lost.append({
                name: float((got[name].double() - got_base[name].double() - change).norm() / change.norm())
                for name, change in ((name, exact[name] - exact_base[name]) for name in exact_base)
            })  # fmt: skip
    together, alone = lost
    assert together.keys() == {"y[0]", "y[1]", "xs[0]"} | (set() if shared else {"xs[1]"})
    for name, value in together.items():
        assert value <= alone[name], (name, value, alone[name])
        assert value < 0.5, (name, value)


# What autograd and torch.compile see.


def arguments(group: Group, route: str = "eager") -> list:
    """The arguments of torch.ops.glora_kernels.grouped_lora_linear."""
    tensors = [group.xs, group.weights, group.downs, group.ups, group.biases, group.seeds]
    distinct = [list({id(t): t for t in part if t is not None}.values()) for part in tensors]
    indices = [
        [ABSENT if t is None else next(i for i, other in enumerate(known) if other is t) for t in part]
        for part, known in zip(tensors, distinct, strict=True)
    ]
    return [*distinct, *indices, group.scales, group.dropout, route]


def backward_arguments(group: Group, needs: list[bool] | None = None) -> list:
    forward = [
        [t.detach() for t in part] if isinstance(part, list) and part and isinstance(part[0], torch.Tensor) else part
        for part in arguments(group)
    ]
    _, hs = OPS.grouped_lora_linear(*forward)
    wanted = [i not in (1, 5) for i, part in enumerate(forward[:6]) for _ in part]
    return [group.dys, hs, needs or wanted, *forward]


@pytest.mark.parametrize(("name", "lead"), [("partly tied", (5,)), ("frozen x", (2, 3)), ("without", (5,))])
def test_opcheck(name, lead):
    group = CASES[name](lead=lead, dtype=torch.float32, dropout=0.25)
    torch.library.opcheck(OPS.grouped_lora_linear.default, tuple(arguments(group)))
    torch.library.opcheck(OPS.grouped_lora_linear_backward.default, tuple(backward_arguments(group)))


@pytest.mark.parametrize("name", ["own", "partly tied", "W, up and bias shared", "without", "ragged", "no rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_equal_real_ones(name, dtype):
    group = CASES[name](dtype=dtype, adapters=torch.float32, dropout=0.25)
    mode = FakeTensorMode()
    for op, args in ((OPS.grouped_lora_linear, arguments(group)),
                     (OPS.grouped_lora_linear_backward, backward_arguments(group))):  # fmt: skip
        fake = [
            [mode.from_tensor(v.detach()) if isinstance(v, torch.Tensor) else v for v in part]
            if isinstance(part, list) else part
            for part in args
        ]  # fmt: skip
        with torch.no_grad():
            real = op(*args)
            with mode:
                pretended = op(*fake)
        flat = [torch.utils._pytree.tree_leaves(results) for results in (real, pretended)]
        for r, f in zip(*flat, strict=True):
            assert (r.shape, r.dtype) == (f.shape, f.dtype)
            strides = [[step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (r, f)]
            assert strides[0] == strides[1]


def test_results_share_no_memory():
    """Of the registered operators: neither with an input nor with each other."""
    group = CASES["partly tied"](dtype=torch.float32)
    args = backward_arguments(group)
    results = [t for t in OPS.grouped_lora_linear_backward(*args) if t.numel()]
    given = {t.untyped_storage().data_ptr() for part in args if isinstance(part, list) for t in part
             if isinstance(t, torch.Tensor) and t.numel()}  # fmt: skip
    storages = [t.untyped_storage().data_ptr() for t in results]
    assert len(results) == len(group.leaves()) == len(set(storages))
    assert not given & set(storages)


def compiled(**options):
    torch._dynamo.reset()
    return lambda call: torch.compile(call, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("name", ["partly tied", "W, up and bias shared", "without", "two inputs",
                                  "three sizes before K"])  # fmt: skip
def test_compiled(name):
    """fullgraph, forward and backward: what eager mode gives."""
    group = CASES[name](dropout=0.25)
    expected, got = group.ours(), group.ours(through=compiled())
    for key, value in expected.items():
        assert torch.allclose(got[key], value, rtol=1e-12, atol=1e-12), key


@pytest.mark.parametrize("trained", [["xs[0]", "downs[0]"], ["ups[1]", "biases[0]"], []])
def test_compiled_with_some_gradients(trained):
    group = CASES["own"]().freeze(trained)
    group.check(group.ours(through=compiled()), torch.float64)


def test_compiled_for_any_number_of_rows():
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(grouped_lora_linear, backend=counting, fullgraph=True, dynamic=True)
    for m in (5, 6, 9, 17):
        group = CASES["own"](lead=(m,))
        ys = function(group.xs[0], group.weights, group.downs, group.ups, group.biases, scales=2.0)
        group.scales = [2.0] * group.size
        group.check(group.results(ys, group.leaves()), torch.float64)
    assert len(frames) == 1


def test_a_compiled_group_is_one_node():
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def record(module, inputs):
        seen.append([str(n.target) for n in module.graph.nodes if n.op == "call_function" and "glora" in str(n.target)])
        return module.forward

    torch._dynamo.reset()
    group = CASES["own"](dtype=torch.float32)
    wrap = aot_autograd(fw_compiler=record, bw_compiler=record)
    group.ours(through=lambda call: torch.compile(call, backend=wrap, fullgraph=True))
    assert seen == [["glora_kernels.grouped_lora_linear.default"],
                    ["glora_kernels.grouped_lora_linear_backward.default"]]  # fmt: skip


def test_compiled_under_autocast():
    group = CASES["tied"](dtype=torch.float32, size=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        got = group.ours(through=compiled())
    assert got["y[0]"].dtype == torch.bfloat16
    group.check(got, torch.bfloat16)


@pytest.mark.parametrize("through", ["eager", "registered"])
def test_an_x_that_no_gradient_multiplies_is_not_kept(through):
    """Only d_down reads x: a frozen one lets go of it. h (M,R) is all that is kept beside the operands."""

    def saved(group: Group) -> dict[int, int]:
        kept: dict[int, int] = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ys = group.call() if through == "eager" else OPS.grouped_lora_linear(*arguments(group))[0]
        group.check(group.results(ys, group.leaves()), torch.float64)
        operands = {t.untyped_storage().data_ptr() for t in (*group.weights, *group.downs, *group.ups, *group.biases)}
        return {address: size for address, size in kept.items() if address not in operands and size}

    group = build((45, 16), lead=[(64,), (64,)], k=[40, 40], rank=3)
    addresses = [x.untyped_storage().data_ptr() for x in group.xs]
    assert set(addresses) <= saved(group).keys()
    group.downs[0].requires_grad_(False)
    kept = saved(group)
    assert addresses[0] not in kept
    assert addresses[1] in kept
    assert sum(kept.values()) == 8 * (64 * 40 + 2 * 64 * 3)


def test_activations_can_be_offloaded():
    """`save_on_cpu` copies whatever is saved."""
    group = CASES["own"]().freeze(["xs[0]", "ups[1]"])
    with torch.autograd.graph.save_on_cpu():
        group.check(group.ours(), torch.float64)


def test_checkpointed():
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        group = CASES["partly tied"](dropout=0.25)

        def call(x, group=group):
            return tuple(replace(group, xs=[x] * group.size).call())

        ys = checkpoint(call, group.xs[0], use_reentrant=reentrant)
        torch.autograd.backward(ys, group.dys)
        expected = group.ours()
        for name, leaf in group.leaves().items():
            assert torch.equal(leaf.grad, expected[name]), name


def test_outputs_may_be_changed_in_place():
    """As those of F.linear: an activation with inplace=True, a rotation written into q."""
    for lead in ((7,), (2, 3)):
        group = CASES["own"](lead=lead)
        ys = group.call()
        torch.relu_(ys[0])
        ys[1].mul_(2)
        got = torch.autograd.grad([*ys], list(group.leaves().values()), group.dys)
        plain = group.loop()
        expected = torch.autograd.grad([plain[0].relu(), plain[1] * 2, plain[2]], list(group.leaves().values()),
                                       group.dys)  # fmt: skip
        for value, truth in zip(got, expected, strict=True):
            assert torch.allclose(value, truth, rtol=1e-12, atol=1e-12)


def test_an_operand_changed_in_place_before_backward_is_noticed():
    group = CASES["own"]()
    ys = group.call()
    with torch.no_grad():
        group.ups[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, group.dys)


@pytest.mark.parametrize("through", ["eager", "compiled"])
def test_an_output_that_nobody_used(through):
    group = CASES["own"]()
    ys = group.call() if through == "eager" else compiled()(group.call)()
    ys[1].backward(group.dys[1])
    alone = group.loop()[1]
    names = ["xs[0]", "downs[1]", "ups[1]", "biases[1]"]
    leaves = group.leaves()
    expected = torch.autograd.grad(alone, [leaves[name] for name in names], group.dys[1])
    for name, truth in zip(names, expected, strict=True):
        assert torch.allclose(leaves[name].grad, truth, rtol=1e-12, atol=1e-12), name
    for name in leaves.keys() - names:
        assert leaves[name].grad is None or not leaves[name].grad.any(), name


def test_a_second_derivative_is_refused():
    group = CASES["own"]()
    first = torch.autograd.grad(group.call()[0].square().sum(), group.xs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


def test_without_gradients():
    group = CASES["own"]()
    expected = group.ours()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ys = group.call()
        assert all(torch.equal(y, expected[f"y[{i}]"]) and not y.requires_grad for i, y in enumerate(ys))
    weight = group.weights[0].clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(grouped_lora_linear(group.xs[0], [weight])[0], group.xs[0] @ weight.t())


def test_meta_tensors():
    group = CASES["three sizes before K"](dropout=0.25)
    meta = [[None if t is None else t.to("meta") for t in part] for part in
            (group.xs, group.weights, group.downs, group.ups, group.biases)]  # fmt: skip
    ys = grouped_lora_linear(*meta, dropout_p=0.25, seeds=group.seeds)
    assert [tuple(y.shape) for y in ys] == [(2, 3, 5, n) for n in (33, 16, 7)]
    assert all(y.is_meta for y in ys)


def test_paths():
    """Members share an h where x, down, mask and scale are the same."""
    group = Indices([0, 0, 0, 1, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, ABSENT], [0, 1, 2, 3, ABSENT], [ABSENT] * 5,
                    [0, 0, 1, 0, ABSENT], [2.0, 2.0, 2.0, 2.0, 1.0], 0.5, "eager")  # fmt: skip
    assert group.paths() == [(0, 0, 0, 2.0), (0, 0, 1, 2.0), (1, 0, 0, 2.0)]
    assert group.path_of() == [0, 0, 1, 2, ABSENT]
    assert group._replace(scales=[2.0, 3.0, 2.0, 2.0, 1.0]).path_of() == [0, 1, 2, 3, ABSENT]
    assert Operands([1], [2, 3], [], [4], [], [5]).flat() == [1, 2, 3, 4, 5]


# Bad input: the message names the member and the argument.


def bad(error, words, **change):
    return pytest.param(error, words, change, id=re.sub(r"\W+", " ", words).strip())


X, W, DOWN, UP = torch.randn(5, 8), torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2)
SEED = torch.tensor([2**62 + 1])
GOOD = {"xs": [X, X], "weights": [W, W], "downs": [DOWN, DOWN], "ups": [UP, UP], "biases": [torch.randn(4)] * 2}


@pytest.mark.parametrize(("error", "words", "change"), [
    bad(ValueError, r"one entry a member.*'xs': 2.*'weights': 1", weights=[W]),
    bad(ValueError, r"one entry a member.*'scales': 3", scales=[1.0] * 3),
    bad(ValueError, r"1 to 64 members; got 0", xs=[], weights=[], downs=None, ups=None, biases=None),
    bad(ValueError, r"1 to 64 members; got 65", xs=X, weights=[W] * 65, downs=None, ups=None, biases=None),
    bad(TypeError, r"xs must be one for all members or a sequence.*generator", xs=(x for x in [X, X])),
    bad(TypeError, r"xs must be one for all members or a sequence.*int", xs=3),
    bad(TypeError, r"scales must be one for all members or a sequence.*Tensor", scales=torch.ones(2)),
    bad(TypeError, r"scales must be one for all members or a sequence.*NoneType", scales=None),
    bad(TypeError, r"ups\[1\] must be a tensor, got float", ups=[UP, 1.0]),
    bad(ValueError, r"xs\[1\] and weights\[1\] must be tensors; got None", weights=[W, None]),
    bad(ValueError, r"xs\[0\] and weights\[0\] must be tensors; got None", xs=None),
    bad(TypeError, r"xs\[1\] must be a floating-point tensor, got torch.int64", xs=[X, X.long()]),
    bad(ValueError, r"xs\[1\].*weights\[1\].*do not fit: \(5, 9\), \(4, 8\)", xs=[X, torch.randn(5, 9)]),
    bad(ValueError, r"xs\[1\].*weights\[1\].*do not fit: \(\), \(4, 8\)", xs=[X, torch.tensor(1.0)]),
    bad(ValueError, r"xs\[0\].*weights\[0\].*do not fit: \(5, 8\), \(8,\)", weights=[W[0], W]),
    bad(TypeError, r"xs\[1\] and weights\[1\] must have one dtype.*torch.float32, torch.float64",
        weights=[W, W.double()]),
    bad(TypeError, r"xs\[1\] is torch.float64 and xs\[0\] torch.float32", xs=[X, X.double()], weights=[W, W.double()]),
    bad(ValueError, r"weights\[1\] requires a gradient", weights=[W, W.clone().requires_grad_()]),
    bad(ValueError, r"downs\[1\] and ups\[1\] come together", ups=[UP, None]),
    bad(ValueError, r"downs\[0\] and ups\[0\] come together", downs=None),
    bad(ValueError, r"downs\[1\] must be \(R, 8\) and ups\[1\] \(4, R\).*\(2, 9\) and \(4, 2\)",
        downs=[DOWN, torch.randn(2, 9)]),
    bad(ValueError, r"downs\[1\] must be \(R, 8\) and ups\[1\] \(4, R\).*\(2, 8\) and \(4, 3\)",
        ups=[UP, torch.randn(4, 3)]),
    bad(ValueError, r"downs\[0\] must be.*R >= 1.*\(0, 8\) and \(4, 0\)",
        downs=[DOWN[:0], DOWN], ups=[UP[:, :0], UP]),
    bad(ValueError, r"downs\[0\] must be.*\(8,\)", downs=[DOWN[0], DOWN]),
    bad(ValueError, r"biases\[1\] must have shape \(4,\); got \(1,\)", biases=[None, torch.randn(1)]),
    bad(ValueError, r"ups\[1\] is on meta and xs\[0\] on cpu", ups=[UP, UP.to("meta")]),
    bad(ValueError, r"weights\[0\] is on meta and xs\[0\] on cpu", weights=W.to("meta")),
    bad(ValueError, r"dropout_p must be in \[0, 1\), got 1.0", dropout_p=1.0, seeds=SEED),
    bad(ValueError, r"dropout_p must be in \[0, 1\), got nan", dropout_p=float("nan"), seeds=SEED),
    bad(ValueError, r"dropout_p=0.5 needs seeds; member 0 has none", dropout_p=0.5),
    bad(ValueError, r"dropout_p=0.5 needs seeds; member 1 has none", dropout_p=0.5, seeds=[SEED, None]),
    bad(ValueError, r"seeds\[1\] must be one int64.*torch.int32", dropout_p=0.5, seeds=[SEED, SEED.int()]),
    bad(ValueError, r"seeds\[0\] must be one int64.*shape \(2,\)", dropout_p=0.5, seeds=SEED.expand(2)),
])  # fmt: skip
def test_bad_input_is_named(error, words, change):
    with pytest.raises(error, match=words):
        grouped_lora_linear(**{**GOOD, **change})


def test_a_forced_backend_that_cannot_serve():
    with backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
        grouped_lora_linear(X, [W, W])
    with backend("triton"), pytest.raises(RuntimeError, match="float64"):
        grouped_lora_linear(X.double(), [W.double()])


def test_a_single_layer_is_a_group_of_one():
    y = glora_linear(X, W, b_down=DOWN, b_up=UP, scale=2.0)
    assert largest_error(grouped_lora_linear(X, W, DOWN, UP, scales=2.0)[0], y) == 0.0
