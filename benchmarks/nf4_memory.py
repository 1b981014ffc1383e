"""What layers over a 4-bit base hold: base, adapters, one workspace, what a forward saves, and the peak of a step.

One layer, and a stack of them that feed each other: base and adapters grow with the layers, the workspace does not.
Beside them PEFT's LoRA on `Linear4bit` and our LoRA on the dense base. All bytes are those of tensors: of parameters
and quantization states; of what autograd saves beyond x, y and those (`saved_tensors_hooks`); the peak of forward and
backward beyond everything held before, by the allocator of a card or the allocations a profiler sees on a CPU. Every
layer is compared with float64 first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, peers, quantized_peers, runner
from benchmarks.battery import LORA, QGLORA, QLORA, QLORA_LORA, Entry
from benchmarks.cases import Contestant, Shape
from benchmarks.devices import Call, Device
from benchmarks.timing import progress
from glora_kernels.quant import QuantState
from glora_kernels.runtime import workspace

CONTESTANTS = (
    (QLORA, "ours"),
    (QGLORA, "ours"),
    (QLORA_LORA, "ours"),
    (QLORA, "peft"),
    (QLORA, "eager"),
    (LORA, "ours"),
)


@dataclass(frozen=True)
class Sizes:
    """Layers with N = K = `size`, and M tokens."""

    size: int
    m: int
    r: int
    layers: tuple[int, ...]
    dtype: str


SIZES = {
    "cuda": Sizes(4096, 2048, 16, (1, 8), "bf16"),
    "cpu": Sizes(2048, 64, 8, (1, 4), "fp32"),
    "tiny": Sizes(64, 8, 4, (1, 2), "fp32"),
}


def measure(sizes: Sizes, device: Device, say: Callable[[str], None] = print) -> dict[str, Any]:
    """A row for each contestant and number of layers; `left_out` has the reason in the place of a row."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for case, impl in progress(CONTESTANTS, "memory"):
        entry = Entry(case, impl, sizes.m, sizes.size, sizes.size, sizes.r, 0.0, dtype=sizes.dtype)
        try:
            layers = [_layer(entry, seed, device) for seed in range(max(sizes.layers))]
            for count in sizes.layers:
                rows.append({"case": case, "impl": impl, "layers": count, **_measure(entry, layers[:count], device)})
        except Exception as error:  # a contestant may fail in any way; the others go on
            left_out[f"memory, {case} ({impl})"] = runner.describe(error)
            say(f"    left out: memory, {case} ({impl}): {runner.describe(error)}")
        layers = []
        workspace.release()
        device.free()
    shape = {"n": sizes.size, "k": sizes.size, "m": sizes.m, "r": sizes.r, "dtype": sizes.dtype}
    return {**shape, "rows": rows, "left_out": left_out}


@dataclass
class Checked(Contestant):
    """A contestant, the error it was found to have, and what it holds beside its adapter."""

    error: float = 0.0
    base: list[Tensor] = field(default_factory=list)


def _measure(entry: Entry, contestants: list[Checked], device: Device) -> dict[str, Any]:
    params = [p for contestant in contestants for p in contestant.params.values()]
    base = [tensor for contestant in contestants for tensor in contestant.base]
    shape = Shape(entry.m, entry.k, entry.n, entry.r or 1, cases.DTYPES[entry.dtype], str(device.torch_device))
    x, dy = cases.random_inputs(shape, torch.Generator(shape.device).manual_seed(1))

    def stack(x: Tensor) -> Tensor:
        for contestant in contestants:
            x = contestant.forward(x)
        return x

    def step() -> object:
        return torch.autograd.grad(stack(x), [x, *params], dy)

    workspace.release()
    step()  # whatever is made once is there
    found = {"base_bytes": tensor_bytes(base), "adapter_bytes": tensor_bytes(params)}
    found["workspace_bytes"] = workspace_bytes(device)
    found["saved_bytes"] = saved_bytes(stack, x, [*params, *base])
    found["peak_bytes"] = peak_bytes(step, device)
    together = sum(found[name] for name in ("base_bytes", "adapter_bytes", "workspace_bytes", "peak_bytes"))
    return {**found, "all_bytes": together, "max_rel_err": max(contestant.error for contestant in contestants)}


def _layer(entry: Entry, seed: int, device: Device) -> Checked:
    """One layer, compared with float64.

    Raises:
        AssertionError: it is not right.
        Unavailable: it cannot be built here.
    """
    dtype = cases.DTYPES[entry.dtype]
    shape = Shape(entry.m, entry.k, entry.n, entry.r or 1, dtype, str(device.torch_device))
    problem = cases.make_problem(shape, cases.case_config(entry.adapter, shape.r), bias=False, seed=seed)
    if entry.case != entry.adapter:
        problem = quantized_peers.quantized(problem)
    found = peers.build(entry, problem)
    error = cases.check(found, problem)
    holder = found.forward if isinstance(found.forward, nn.Module) else cases.base_layer(problem)
    return Checked(found.case, found.impl, found.forward, found.params, error, held(holder, found.params))


def held(module: nn.Module, params: Mapping[str, Tensor]) -> list[Tensor]:
    """What a module keeps beside its adapter: frozen parameters, buffers, codes and quantization states."""
    trained = {id(tensor) for tensor in params.values()}
    found = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in trained]
    layer: Any
    for layer in module.modules():
        state = getattr(layer, "quant_state", None)
        found += [*([layer.weight] if isinstance(state, QuantState) else []), *state_tensors(state)]
    return found


def state_tensors(state: Any) -> list[Tensor]:
    """The tensors beside the codes, of our state or bitsandbytes'."""
    if state is None:
        return []
    if isinstance(state, QuantState):
        return list(state.tensors())
    values = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    return [value for value in values if isinstance(value, Tensor)] + state_tensors(getattr(state, "state2", None))


def tensor_bytes(tensors: list[Tensor]) -> int:
    """Each piece of memory once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def workspace_bytes(device: Device) -> int:
    """The one buffer that is reused, as large as the last calls made it; 0 where none needed it."""
    one = torch.empty(1, 1, device=device.torch_device)
    size = workspace.workspace_like(one, one.dtype).untyped_storage().nbytes()
    return 0 if size == one.nbytes else size


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, owned: list[Tensor]) -> int:
    """What autograd keeps between forward and backward beyond x, y and what is there anyway."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, y, *owned)}
    return tensor_bytes([tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in known])


def peak_bytes(step: Call, device: Device) -> int:
    """The most a step holds beyond what was held before it."""
    found = device.peak_bytes(step)
    if found is not None:
        return found
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler
    assert results is not None
    assert results.kineto_results is not None
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
