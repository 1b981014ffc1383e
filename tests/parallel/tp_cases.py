"""Tensor parallelism equals one process: single layers over the sharding table, whole models, files, collectives."""

from __future__ import annotations

import copy
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from two_meshes import (
    EXACT,
    LORA,
    MODELS,
    adamw,
    alike,
    backward,
    cut,
    filled,
    gradients,
    injected,
    layer,
    llama,
    loaded_in_parts,
    piece,
    planned,
    quantized,
    raises,
    train,
    values,
)

import glora_kernels as gk
from glora_kernels.parallel.cost import LLAMA
from glora_kernels.quant import dequantize
from glora_kernels.spec import all_configs

PRODUCT = gk.GLoRAConfig("lora", "lora", rank=3, variant="matmul")


def layers_equal_their_whole(mesh, every=29):
    """Every support in each direction, with and without a bias (a trained one): y, dx and all gradients."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64)
    dy = torch.randn(3, 5, 16, generator=generator, dtype=torch.float64)
    cases = [(config, direction, bias) for config in all_configs(rank=3) for direction in ("column", "row")
             for bias in (True, False)]  # fmt: skip
    for config, direction, bias in [*cases[::every], (PRODUCT, "column", True)]:
        column = direction == "column"
        alone, ours = layer(config, bias=bias), cut(layer(config, bias=bias), mesh, direction)
        given = x.clone().requires_grad_()
        part = (x if column else piece(x, mesh)).clone().requires_grad_()
        y, mine = alone(given), ours(part)
        y.backward(dy)
        mine.backward(piece(dy, mesh) if column else dy)
        found = {"y": mine.detach(), "dx": part.grad} | gradients(ours)
        wanted = {"y": piece(y.detach(), mesh) if column else y.detach()}
        wanted["dx"] = given.grad if column else piece(given.grad, mesh)
        alike(found, wanted | gradients(alone))


def gradients_are_labelled(mesh):
    """What every rank has whole has parts of a sum as its gradient; D, E and the bias of a row layer are whole."""
    config = gk.GLoRAConfig("vector", "lora", "none", "vector", "vector", rank=3)
    for direction in ("column", "row"):
        ours = cut(layer(config), mesh, direction)
        x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ours(x if direction == "column" else piece(x, mesh)).sum().backward()
        found = {
            name: (p.placements[0], p.grad.placements[0]) for name, p in ours.named_parameters() if p.requires_grad
        }
        cut_, part, once = (Shard(0), Shard(0)), (Replicate(), Partial()), (Replicate(), Replicate())
        if direction == "column":
            assert found == dict.fromkeys(("bias", "A", "B_up", "D", "E"), cut_) | {"B_down": part}
        else:
            wanted = {"A": part, "B_up": part, "B_down": (Shard(1), Shard(1))}
            assert found == wanted | dict.fromkeys(("bias", "D", "E"), once)


def models_equal_one_process(mesh, folder, after):
    """Five steps; saved as one process does. `after`: injected into a base that is cut, the values from a file."""
    for name, config in MODELS.items():
        if after and name not in ("A lora, C, D, E", "ShareLoRA"):
            continue
        print(f"[{name}]", end=" ", flush=True)
        alone = injected(config)
        mine, theirs = folder / "mine.safetensors", folder / f"theirs{mesh.get_local_rank()}.safetensors"
        gk.save_adapter(alone, theirs)
        if after:
            ours = gk.load_adapter(gk.inject(planned(llama(), mesh), config), theirs)
        else:
            ours = planned(injected(config), mesh)
        gk.save_adapter(ours, mine)
        assert mine.read_bytes() == theirs.read_bytes()
        dist.barrier()
        equal_steps(ours.train(), alone.train())
        if isinstance(config, gk.ShareLoRAConfig):
            factors = {p for block in ours.model.layers for p in [block.self_attn.q_proj.B_down]}
            assert len(factors) == 1, "the shared factor is no longer one parameter"


def equal_steps(ours, alone, mesh=None, steps=5):
    torch.manual_seed(1)
    backward(ours, 0, mesh)
    torch.manual_seed(1)
    backward(alone, 0)
    alike(gradients(ours), gradients(alone))
    ours.zero_grad()
    alone.zero_grad()
    torch.testing.assert_close(train(ours, range(steps), mesh), train(alone, range(steps)), rtol=EXACT, atol=0)
    alike(values(ours), values(alone))


def a_plain_model_takes_a_file(mesh, folder):
    """load_adapter injects into a base that is cut; disabled is the base; a failed load changes nothing."""
    path = folder / f"plain{mesh.get_local_rank()}.safetensors"
    alone = injected(MODELS["A vector"])
    gk.save_adapter(alone, path)
    ours = gk.load_adapter(planned(llama(), mesh), path)
    alike(values(ours), values(alone))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad(), gk.disabled(ours):
        torch.testing.assert_close(ours(tokens).logits, llama()(tokens).logits, rtol=0, atol=EXACT)
    before = values(ours)
    gk.save_adapter(injected(LORA), path)
    raises(ValueError, "does not fit the layer", lambda: gk.load_adapter(ours, path))
    alike(values(ours), before, 0.0)


def of_transformers(mesh, folder):
    """A model that transformers loads in parts (`DistributedConfig`): injected, trained, generating, saved."""
    ours = loaded_in_parts(folder, mesh)
    alone = injected(LORA)
    path = folder / f"own{mesh.get_local_rank()}.safetensors"
    gk.save_adapter(alone, path)
    gk.load_adapter(gk.inject(ours, LORA), path)
    equal_steps(ours.train(), alone.train())
    tokens, options = torch.arange(10).view(2, 5), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    told = [model.eval().generate(tokens, attention_mask=mask, **options) for model in (ours, alone)]
    assert torch.equal(*told)


def of_4_bits(mesh):
    """The parts of NF4 codes hold the values of the whole; what cannot be cut is refused before anything changes."""
    ours, alone = quantized(), quantized()
    planned(ours, mesh)
    for direction, name in ((0, "q_proj"), (1, "o_proj")):
        part, whole = (getattr(model.model.layers[0].self_attn, name) for model in (ours, alone))
        wanted = dequantize(whole.codes(), torch.float32).chunk(mesh.size(), direction)[mesh.get_local_rank()]
        assert torch.equal(dequantize(part.codes(), torch.float32), wanted)
        assert part.weight.numel() * mesh.size() == whole.weight.numel()
    equal_steps(ours, alone)
    assert not any(name.endswith("q_proj.weight") for name in ours.state_dict())
    nested = quantized(double_quant=True).model.layers[0].self_attn
    codes = nested.o_proj.weight
    raises(ValueError, "quantize with double_quant=False", lambda: cut(nested.o_proj, mesh, "row"))
    assert nested.o_proj.weight is codes
    raises(ValueError, "which in double quantization are not whole blocks", lambda: cut(nested.k_proj, mesh, "column"))
    narrow = gk.inject(gk.quantize(torch.nn.Linear(64, 64), "nf4"), LORA)
    raises(ValueError, "are not whole blocks of 64", lambda: cut(narrow, mesh, "row"))
    bare = gk.quantize(torch.nn.Linear(64, 64), "nf4")
    raises(ValueError, "a 4-bit layer without an adapter", lambda: cut(bare, mesh, "column"))


def _counted(act):
    with CommDebugMode() as comm:
        act()
    return Counter({str(op).rpartition(".")[2]: count for op, count in comm.get_comm_counts().items()})


def collectives(mesh):
    """Beside those of the frozen base, one: at the step, for the gradients of all that every rank has whole."""
    kinds = {}
    for name, config in {"frozen": None, **MODELS}.items():
        ours = llama() if config is None else injected(config)
        planned(ours, mesh)
        if config is None:  # as in a model whose first layer trains something
            ours.requires_grad_(False)
            ours.model.norm.weight.requires_grad_(True)
        ours.train()
        if config is not None:
            backward(ours, 0)  # the ranks compare their dropout seeds once
        passes = sum((_counted(lambda model=ours, step=step: backward(model, step)) for step in (1, 2)), Counter())
        with _Sent() as sent:
            step = Counter() if config is None else _counted(adamw(ours).step)
        kinds[name] = passes, step
        print(f"\n  {name}: two passes {dict(passes)}, the step {dict(step)}, {sent.bytes} bytes", end="")
        if config is not None:
            told = gk.parallel.traffic(injected(config), LLAMA, mesh.size())
            assert (told.tensor_sums, told.tensor_bytes) == (_sums(name), sent.bytes), name
            held = {p: None for p in ours.parameters() if p.requires_grad}
            assert told.data_bytes == sum(p.to_local().nbytes for p in held), name
            assert told.trained == gk.trainable_parameters(ours), name
    # 5 sums of y (embedding, o, down), 7 of dx (q, k, v of the second block, gate and up of both), that of the head.
    own = Counter(all_reduce=2 * (5 + 7 + 1), all_gather_into_tensor=2)
    assert kinds["frozen"][0] == Counter(all_reduce=2 * (5 + 1), all_gather_into_tensor=2)
    for name, (passes, step) in kinds.items():
        if name != "frozen":
            assert passes == own, name
            assert step == Counter(allreduce_=1), name


class _Sent(TorchDispatchMode):
    """Counts the bytes that sums over ranks add up."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations on its parts come here
        if func is torch.ops.c10d.allreduce_.default:
            self.bytes += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def _sums(name):
    """Parameters whole on every rank, with parts of a sum as gradients; 2 blocks of 5 column and 2 row layers."""
    column, row = 10, 4
    return {
        "LoRA, dropout": column + row,  # B_down; B_up
        "A vector": column + 2 * row,  # B_down; A, B_up
        "A lora, C, D, E": 4 * column + 3 * row,  # A_down, B_down, C_up, C_down; A_up, B_up, C_down
        "constants": 2 * column
        + 2 * row
        + column
        + 6,  # A, C; A, B; E; D, where there is a bias: q, k, v of both blocks
        "ShareLoRA": 5 + row,
        "ShareLoRA AB": 5 + 2,
    }[name]


def one_sum_of_dx(mesh):
    """Layers that are given one DTensor (PrepareModuleInput on their parent) have one gradient of it to add up."""
    from torch.distributed.tensor.parallel import PrepareModuleInput

    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (layer(LORA, dtype=torch.float64).eval() for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    grads = {}
    for together in (False, True):
        module = Three()
        plan = dict.fromkeys(("q", "k", "v"), gk.parallel.GLoRAColwise())
        prepare = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
        parallelize_module(module, mesh, {**({"": prepare} if together else {}), **plan})
        x = torch.ones(2, 24, dtype=torch.float64, requires_grad=True)
        counted = _counted(lambda module=module, x=x: module(x).sum().backward())
        assert counted["all_reduce"] == (1 if together else 3), counted
        grads[together] = {"dx": x.grad}
    alike(grads[True], grads[False])


def accumulates(mesh):
    """Two backwards before a step, and one after a step without zero_grad, on sums that are added up once or twice."""
    ours, alone = planned(injected(MODELS["A vector"]), mesh), injected(MODELS["A vector"])
    for steps in ((0, 1), (2,), (3, 4)):
        for step in steps:
            backward(ours, step)
            backward(alone, step)
        alike(gradients(ours), gradients(alone))
        for model in (ours, alone):
            torch.optim.SGD(gk.parameter_groups(model), lr=0.1).step()
        alike(gradients(ours), gradients(alone))
    alike(values(ours), values(alone))


def small_terms_survive_16_bits(mesh):
    """A small E, added by the first rank before the sum, is there on average; the same over the frozen layer."""
    generator = torch.Generator().manual_seed(0)
    config = gk.GLoRAConfig("none", "none", E="vector", rank=1)
    made = layer(config, n=64, k=64, bias=True, dtype=torch.bfloat16)
    made.bias.requires_grad_(False)
    with torch.no_grad():
        made.E.fill_(1e-3)
    ours = cut(made, mesh, "row")
    x = piece(torch.randn(4096, 64, generator=generator).bfloat16(), mesh)
    with torch.no_grad():
        y = ours(x).double()
        with gk.disabled(ours):
            change = (y - ours(x).double()).mean() / 1e-3
    assert abs(change - 1) < 0.1, change


def refuses(mesh):
    column, row = gk.parallel.GLoRAColwise, gk.parallel.GLoRARowwise
    ranks = mesh.size()
    raises(
        ValueError, f"its out_features, 15, cannot be cut into {ranks}", lambda: cut(layer(LORA, n=15), mesh, "column")
    )
    raises(ValueError, f"its in_features, 23, cannot be cut into {ranks}", lambda: cut(layer(LORA, k=23), mesh, "row"))
    raises(ValueError, "A=lora in the product variant", lambda: cut(layer(PRODUCT), mesh, "row"))
    merged = layer(LORA)
    merged.merge()
    raises(RuntimeError, "a merged layer cannot be cut", lambda: cut(merged, mesh, "column"))
    once = cut(layer(LORA), mesh, "column")
    raises(ValueError, "it is cut already", lambda: cut(once, mesh, "column"))
    raises(TypeError, "mixed Tensor and DTensor", lambda: once.forward(torch.ones(2, 24, dtype=torch.float64)))
    once.B_up = torch.nn.Parameter(torch.zeros(16, 4, dtype=torch.float64))
    raises(TypeError, "a plain tensor beside DTensors", lambda: once(torch.ones(2, 24, dtype=torch.float64)))
    raises(ValueError, "cut over ranks by tensor parallelism", cut(layer(LORA), mesh, "column").merge)
    shared = torch.nn.ModuleList([layer(LORA, k=16) for _ in range(2)])
    shared[1].B_down = shared[0].B_down
    raises(ValueError, "shared with a layer that is cut in another way",
           lambda: parallelize_module(shared, mesh, {"0": column(), "1": row()}))  # fmt: skip
    fused = injected(gk.GLoRAConfig.lora(rank=4))
    gk.fuse_siblings(fused)
    before = copy.deepcopy(list(fused.state_dict()))
    raises(ValueError, "take them apart by split_siblings", lambda: planned(fused, mesh))
    assert list(fused.state_dict()) == before
    tied = gk.inject(llama(), gk.ShareLoRAConfig(rank=4, dropout=0.1, tie_siblings=True))
    raises(ValueError, "one dropout mask with its siblings", lambda: planned(tied, mesh))
    named = injected(LORA)
    gk.add_adapter(named, "second", LORA)
    raises(ValueError, "adapters beside the first (second)", lambda: planned(named, mesh))
    odd = llama(num_labels=1)
    odd.config.num_key_value_heads = 3
    raises(ValueError, "3 num_key_value_heads cannot be divided", lambda: gk.parallel.plan(odd, mesh))
    raises(ValueError, "has no tp_plan", lambda: gk.parallel.plan(torch.nn.Linear(2, 2), mesh))
    hooked = ColwiseParallel()._apply(torch.nn.Linear(4, 4), mesh)
    hooked.register_forward_hook(lambda *_: None)
    raises(
        ValueError, "its hooks or its forward are not those", lambda: gk.inject(torch.nn.Sequential(hooked), LORA, "0")
    )
    plain = RowwiseParallel()._apply(torch.nn.Linear(4, 4), mesh)
    raises(ValueError, "inject(model, ...) takes it", lambda: gk.GLoRALinear.from_linear(plain, LORA))
    in_parts = planned(injected(LORA), mesh)
    raises(ValueError, "give mesh=, the data-parallel dimension", lambda: gk.fully_shard(in_parts))
    raises(ValueError, "merge: the model is cut over ranks", lambda: gk.merge(in_parts))
    raises(ValueError, "do it in a model in one piece", lambda: gk.add_adapter(in_parts, "second", LORA))
    first = FullyShardedDataParallel(layer(LORA), use_orig_params=True, device_id=torch.device("cpu"))
    raises(ValueError, "use gk.fully_shard", lambda: first(torch.ones(2, 24, dtype=torch.float64)))


def seeds_must_agree(mesh):
    """Each rank draws the masks itself: ranks that are seeded differently are told so at the first one."""
    from glora_kernels.parallel import call

    call._CHECKED.clear()
    ours = cut(filled(layer(LORA)), mesh, "column").train()
    torch.manual_seed(mesh.get_local_rank())
    raises(RuntimeError, "seed them alike", lambda: ours(torch.ones(2, 24, dtype=torch.float64)))
    torch.manual_seed(0)
    ours(torch.ones(2, 24, dtype=torch.float64))
