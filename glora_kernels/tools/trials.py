"""What `tune` checks and times: one pass of a layer on random tensors, planned under a choice as a real call is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glora_kernels.dispatch.common import given
from glora_kernels.dispatch.prepared import AskedPass
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.four_bit.served import why_not
from glora_kernels.quant import dequantize
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime import configs, environment, program, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.program import PassInputs
from glora_kernels.runtime.recording import Bound, Recording
from glora_kernels.runtime.sizes import at
from glora_kernels.runtime.tables import DEQUANTIZE, NAMED, SMALL_M, Table
from glora_kernels.spec import GLoRAConfig
from glora_kernels.tools import planned
from glora_kernels.tools.planned import How, Linear

FORMS = {
    "lora": GLoRAConfig.lora(1, 2.0),
    "full": GLoRAConfig("vector", "lora", "vector", "vector", "vector", 1, dropout=0.1),
    "vectors": GLoRAConfig("none", "vector", "none", "vector", "vector", 1),
    "product": GLoRAConfig("lora", "lora", "none", "none", "none", 1, variant="matmul"),
    "both": GLoRAConfig("lora", "lora", "none", "none", "none", 1),
    "both, dropout": GLoRAConfig("lora", "lora", "none", "none", "none", 1, dropout=0.1),
    "scaled": GLoRAConfig("vector", "lora", "none", "none", "none", 1),
}
"""The layers that choices are tried in, without their rank."""

TRIED = {
    "fwd": ("lora", "full", "vectors", "product"), "dx": ("lora", "full", "vectors", "product"),
    "prepare": ("lora", "both, dropout", "product"), "added_terms": ("lora", "full", "product"),
    "dy": ("lora", "vectors", "product"), "x": ("lora", "full", "product"),
    "hadamard_grad": ("both", "both, dropout"), "small_m": ("lora",),
}  # fmt: skip
"""The `FORMS` that a kernel is tried in: it is timed in the first, and must compile, be right and no slower in all."""

_BACKWARD = ("dx", "dy", "x", "hadamard_grad", "route dx", "route dx scaled")
_OVER_CODES = (DEQUANTIZE, SMALL_M, "small_m")
_ROUTES = [name for name in NAMED if name.startswith("route")]
_RESULTS = ("y", "h", "sigma", "u", "wc", "mask")


def forms(what: str) -> tuple[str, ...]:
    """The `FORMS` in which choices for a kernel or name are tried."""
    return TRIED.get(what, ("scaled" if what.endswith("scaled") else "lora",))


def kernel_of(step: Any) -> str:
    """The key in `configs.KERNELS` of the kernel of a `Launch`; "" for any other step."""
    return configs.key_of(getattr(getattr(step, "kernel", None), "__name__", ""))


@dataclass
class Trial:
    """A pass under one choice, bound to memory: its steps, those of them that are timed, its results and its memory."""

    choice: Any
    steps: list[Any]
    timed: list[Any]
    outputs: dict[str, Tensor]
    memory: list[Tensor]

    def run(self) -> None:
        """Run the steps that are timed."""
        for step in self.timed:
            step.run()

    def run_all(self) -> None:
        """Run the whole pass, so that the timed steps then read real values."""
        for step in self.steps:
            step.run()

    def results(self) -> dict[str, Tensor]:
        """Run the whole pass once, on memory filled with NaN, and return its results."""
        for room in self.memory:
            room.view(torch.uint8).fill_(0xFF)
        self.run_all()
        return {name: tensor.float().clone() for name, tensor in self.outputs.items()}


class Data:
    """A layer of one of the `FORMS` with random tensors, and memory for the trials on it."""

    def __init__(
        self, what: str, form: str, shape: Shape, dtype: torch.dtype, device: str, arch: str, seed: int = 0
    ) -> None:
        four_bits = what in _OVER_CODES
        self.what, self.shape, self.dtype, self.arch = what, shape, dtype, arch
        config = GLoRAConfig.from_dict(FORMS[form].to_dict() | {"rank": max(1, shape.r)})
        layer = Linear(config, shape.n, shape.k, True, quant_type="nf4" if four_bits else "", nested=four_bits)
        how = How(max(1, shape.m), dtype, arch, route="auto" if four_bits else "triton", device=device)
        with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            torch.manual_seed(seed)
            self.call = planned.linear_call(layer, how)
            self._dy = torch.randn(how.m, layer.n, device=device, dtype=dtype)
        self._rooms: dict[Any, Tensor] = {}
        self._saved: list[Any] = []
        if what in _BACKWARD:
            with tables.using(None, dict.fromkeys(_ROUTES, "fused")):
                forward = self._bound(self._forward(), None)
            forward.results()
            everything = (*self.call.row, *(forward.outputs.get(name) for name in _RESULTS))
            self._saved = [everything[i] for i in self.call.prepared.saved]

    def trial(self, choice: Any, table: Table | None = None) -> Trial:
        """The trial of a choice, with a table's choices for everything else.

        Raises:
            ValueError: the chosen kind of kernels does not serve the call; the message says why.
        """
        routes = dict.fromkeys(_ROUTES, "library" if self.what == "added_terms" else "fused")
        few = {SMALL_M: "triton"} if self.what == "small_m" else {}
        with tables.using(table, (routes if self.what in TRIED else {}) | few | {self.what: choice}):
            if self.what == DEQUANTIZE:
                return self._dense(choice)
            kind = few.get(SMALL_M, choice)
            if self.what in (SMALL_M, "small_m") and kind != "workspace":
                reason = why_not(kind, self.call.x, self.call.weight, self.shape.r)
                if reason:
                    raise ValueError(reason)
            return self._bound(self._backward() if self._saved else self._forward(), choice)

    def _forward(self) -> AskedPass:
        call = self.call
        with_rows = frozenset(place for place in call.prepared.with_rows if place < len(call.row))
        operands = PassInputs(tuple(call.row), with_rows, len(self.call.x), self.call.x.get_device())
        return call.prepared.forward_pass(operands)

    def _backward(self) -> AskedPass:
        return self.call.prepared.backward_pass([self._dy], self._saved)

    def _dense(self, kind: str) -> Trial:
        out = self._room("dense", self.shape.n * self.shape.k * self.dtype.itemsize).view(self.dtype)
        out = out.view(self.shape.n, self.shape.k)
        launch = four_bit.dequantize_launch(self.call.weight, out, route="auto", arch=self.arch)
        return Trial(kind, [launch], [launch], {"dense": out}, [self._rooms["dense"]])

    def _bound(self, asked: AskedPass, choice: Any) -> Trial:
        """Record a pass as its program is recorded, and bind it to the memory of this object."""
        device, m = self.call.x.device, asked.operands.m
        programs = environment.multiprocessors(device.index or 0) if device.type == "cuda" else None
        recording, results = program.record(asked.function, asked.operands, asked.values, self.arch, programs)
        places = recording.results(results)
        assert places is not None, "an operation of PyTorch had part in it"
        memory = self._memory(recording, asked)
        here = Bound(recording, memory, m)
        steps = [step.bound(here) for step in recording.steps]
        timed = [step for step in steps if kernel_of(step) == self.what] if self.what in TRIED else steps
        call, own = self.call, memory[recording.count :]
        names = [f"d{call.names[i]}" for i in call.prepared.trained] if self._saved else _RESULTS
        outputs = {
            name: memory[place.slot] if place.twin is None else here.view(place.twin)
            for name, place in zip(names, places, strict=False)
            if place is not None
        }
        return Trial(choice, steps, timed, outputs, [t for t in own if t is not None])

    def _memory(self, recording: Recording, asked: AskedPass) -> list[Any]:
        """A tensor for every slot of a recording; the trials of one object share them."""
        key, m = bool(self._saved), asked.operands.m
        memory: list[Any] = list(asked.operands.tensors)
        for made in recording.made:
            if made.is_alone:
                room = self._room((key, len(memory)), at(made.nbytes, m))
                memory.append(room.view(made.dtype).view([at(size, m) for size in made.shape]))
        for name, size in (("block", recording.scratch or 0), ("workspace", recording.workspace_bytes)):
            memory.append(self._room((key, name), at(size, m)))
        return memory

    def _room(self, key: Any, size: int) -> Tensor:
        held = self._rooms.get(key)
        if held is None or len(held) < size:
            held = self._rooms[key] = torch.empty(size, dtype=torch.uint8, device=self.call.x.device)
        return held[:size]

    def wrong(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None) -> str:
        """Which result is wrong, and by how much; "" if all are right.

        A dequantized weight must be bit for bit that of `quant.dequantize`. A forward of a few tokens must meet
        `tolerance.allowed_error`. All else is compared with the results of the first choice.
        """
        if self.what == DEQUANTIZE:
            dense = dequantize(self.call.weight, self.dtype).float()
            differing = int((found["dense"] != dense).sum())
            return f"{differing} of {dense.numel()} numbers are not those of quant.dequantize" if differing else ""
        if self.what == SMALL_M:
            truth, plain = self._literal(torch.float64), self._literal(self.dtype)
            for name, value in truth.items():
                error = largest_error(found[name], value)
                allowed = allowed_error(value, plain[name], self.dtype)
                if not error <= allowed:
                    return f"{name} is off by {error:.1e}, allowed is {allowed:.1e}"
            return ""
        return "" if expected is None else disagreement(found, expected, self.dtype, 8 if self.what in NAMED else 4)

    def _literal(self, dtype: torch.dtype) -> dict[str, Tensor]:
        call, s = self.call, self.call.supports
        x, up, down, bias = (given(tensor).to(dtype) for tensor in (call.x, s.b_up, s.b_down, s.bias))
        h = call.scale * (x @ down.T)
        return {"y": x @ dequantize(call.weight, self.dtype).to(dtype).T + h @ up.T + bias, "h": h}


def disagreement(ours: Mapping[str, Tensor], other: Mapping[str, Tensor], dtype: torch.dtype, slack: float) -> str:
    """Which result differs by more than another order of summation explains, and by how much; "" if none does.

    The largest difference over the largest value, at most `slack` machine epsilons of the dtype.
    """
    allowed = slack * max(torch.finfo(dtype).eps, 2.5e-5 if dtype == torch.float32 else 0.0)
    if dtype == torch.float32 and environment.allow_tf32():
        allowed = slack * 2e-3
    for name, value in other.items():
        difference = (ours[name].float() - value.float()).abs().max()
        error = float(difference / value.float().abs().max().clamp_min(1e-30)) if value.numel() else 0.0
        if not error <= allowed:
            return f"{name} is off by {error:.1e} of its largest value, allowed is {allowed:.1e}"
    return ""


def sets(what: str, shape: Shape, dtype: torch.dtype, l2_bytes: int, memory_bytes: int) -> int:
    """The number of input sets to rotate: together they are read as twice the L2 cache, if memory allows."""
    m, n, k, _ = shape
    smallest, whole = m * min(n, k) * dtype.itemsize, 3 * (m * n + m * k + n * k) * dtype.itemsize
    if what in _OVER_CODES:
        smallest, whole = int(n * k * 0.52), 4 * n * k
    wanted = -(-2 * l2_bytes // max(1, smallest))
    return max(2, min(wanted, 16, memory_bytes // (2 * max(1, whole))))
