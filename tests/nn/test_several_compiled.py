"""Several adapters under torch.compile, DistributedDataParallel and FSDP2: what is compiled again, and what is not."""

import contextlib
import copy
import sys

import pytest
import torch
import torch.distributed as dist
from many import LORA, WIDE, Net, alone, grads, many, mixed, near, randomized, two, x_of
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from two_processes import needs_distributed

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig

RICH = GLoRAConfig("vector", "lora", "lora", "vector", "vector", rank=2, alpha=3)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def three():
    return randomized(gk.add_adapter(two(net=lambda: Net(1)), "c", RICH))


def compiled(model, backend):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def trained(model, x, names):
    """y and all gradients of a mixed batch."""
    model.zero_grad()
    y = mixed(model, x, names)
    y.square().sum().backward()
    return y, {name.removeprefix("_orig_mod."): grad for name, grad in grads(model).items()}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_assignment_is_not_compiled_again(backend):
    model, x = three(), x_of(4)
    fast, counter = compiled(copy.deepcopy(model), backend)
    index = torch.zeros(4, dtype=torch.int64)
    for names, places in {
        ("b", "c", None, "b"): [1, 2, -1, 1], ("c", None, "b", "c"): [0, 0, 0, 0], (None, "b", "c", "b"): [2, -1, -1, 1]
    }.items():  # fmt: skip
        index.copy_(torch.tensor(places))
        given = names if backend == "eager" else index
        (y, got), (wanted, right) = trained(fast, x, given), trained(model, x, given)
        near(y, wanted)
        assert got.keys() == right.keys()
        for name, grad in right.items():
            near(got[name], grad)
    assert counter.frame_count == 1


def test_inference_with_any_names_is_one_graph():
    model, x = three().eval(), x_of(4)
    fast, counter = compiled(copy.deepcopy(model), "eager")
    with torch.no_grad():
        for names in (["b"] * 4, [None] * 4, ["c", "b", None, "default"]):
            near(mixed(fast, x, names), alone(model, x, names))
    assert counter.frame_count == 1


def test_a_cuda_graph_cannot_read_names(monkeypatch):
    monkeypatch.setattr(sys.modules["glora_kernels.nn.mixed"], "is_capturing", lambda device: True)
    model = two()
    with gk.rows(model, ["b"] * 4), pytest.raises(RuntimeError, match=r"graph .* give gk.rows an index tensor on meta"):
        model.blocks[0].up(x_of().to("meta"))


def test_compiled_inside_the_context():
    model, x, names = three(), x_of(4), ["b", None, "c", "default"]
    fast, _ = compiled(model, "eager")

    def both(x):
        return fast(x) * 2.0

    with gk.rows(fast, names):
        y = both(x)
    near(y, alone(model, x, names) * 2.0)
    near(fast(x), model(x))


def test_swapping_compiles_nothing_again(tmp_path):
    model, x = two(net=lambda: Net(1)), x_of(2)
    paths = []
    for factor in (0.5, 0.25):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(factor if parameter.requires_grad else 1.0)
        paths.append((tmp_path / str(factor), other))
        gk.save_adapter(other, paths[-1][0], "b")
    gk.set_adapter(model, "b")
    fast, counter = compiled(model, "eager")
    near(fast(x), mixed(model, x, ["b", "b"]))
    near(copy.deepcopy(model)(x), fast(x))
    for path, other in paths:
        gk.load_adapter(fast, path, "b")
        near(fast(x), mixed(other, x, ["b", "b"]))
    assert counter.frame_count == 1
    gk.set_adapter(fast, "default")
    near(fast(x), mixed(model, x, ["default"] * 2))
    gk.set_adapter(fast, "b")
    near(fast(x), mixed(paths[1][1], x, ["b", "b"]))
    assert counter.frame_count == 2, "an adapter is compiled once"


@contextlib.contextmanager
def one_process(path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@needs_distributed
def test_in_distributed_wrappers(tmp_path):
    x, names = x_of(4), ["b", "default", None, "b"]
    index = torch.tensor([1, 0, -1, 1])
    y, wanted = trained(two(), x, names)
    with one_process(tmp_path / "store"):
        ddp = nn.parallel.DistributedDataParallel(two())
        for given in (index, names):  # all take part
            got_y, got = trained(ddp, x, given)
            near(got_y, y)
            assert {name.removeprefix("module."): 0 for name in got} == dict.fromkeys(wanted, 0)
            for name, grad in got.items():
                near(grad, wanted[name.removeprefix("module.")])
        for _ in range(2):  # DistributedDataParallel notices in the next step what got no gradient
            _, got = trained(ddp, x, torch.tensor([1, 1, -1, -1]))
        assert {name for name, grad in got.items() if grad.any()} == {name for name in got if ".b." in name}
        for call in (lambda: gk.add_adapter(ddp, "c", LORA, ["down"]), lambda: gk.add_adapter(ddp, "c", LORA)):
            with pytest.raises(ValueError, match="DistributedDataParallel"):
                call()
        gk.set_adapter(ddp, "b")
        near(ddp(x), mixed(ddp.module, x, ["b"] * 4))

        model = two()
        gk.fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        got_y, got = trained(model, x, names)
        near(got_y, y)
        for name, grad in got.items():
            near(grad.full_tensor(), wanted[name])
        gk.save_adapter(model, tmp_path / "b", "b")
        near(mixed(gk.load_adapter(many(["default"]), tmp_path / "b", "b"), x, names), y)
        with pytest.raises(ValueError, match="add adapters before fully_shard"):
            gk.add_adapter(model, "c", WIDE)
        shared = gk.add_adapter(many(["default"]), "s", ShareLoRAConfig(rank=2))
        with pytest.raises(ValueError, match=r"'s' of 'blocks.1.up' shares factors.*only the first"):
            gk.fully_shard(shared)
