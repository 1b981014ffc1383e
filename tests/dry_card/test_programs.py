"""Programs and what goes to the driver from C: the card is given the same as by the passes as they are written."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from typing import Any

SEEDS = 7, -1, 2**31, 2**62 + 12345, -(2**63)
HUGE = 2**31 + 1


def _step(x: Any, supports: dict[str, Any], **options: Any) -> None:
    import torch

    from dry_card import forms
    from glora_kernels.glora.op import glora_linear

    weight = options.pop("weight", None)
    y = glora_linear(x, forms.tensor(256, 256) if weight is None else weight, **supports, **options)
    torch.autograd.grad(y, [x, *supports.values()], torch.empty_like(y))


def _lora(device: str = "cuda") -> dict[str, Any]:
    from dry_card import forms

    shapes = {"b_up": (256, 16), "b_down": (16, 256)}
    return {name: forms.tensor(*shape, device=device, grad=True) for name, shape in shapes.items()}


def both_ways() -> dict[str, Any]:
    """Of several calls, what differs between programs and passes; seeds that a card was not given."""
    import torch

    import glora_kernels as gk
    from dry_card import card, forms
    from glora_kernels.dispatch import prepared
    from glora_kernels.runtime.program import launching

    def given(run: Any) -> list[Any]:
        with card.recorded() as log:
            run()
        return [
            (e.name, e.grid, e.threads, e.shared, e.device, e.stream,
             [p.hex() if len(p) <= 4 else len(p) for p in e.parameters])
            for e in log
        ]  # fmt: skip

    supports, answer = _lora(), {"differ": [], "seeds": []}
    odd = forms.tensor(64 * 256 + 1, grad=False)[1:].view(64, 256)
    calls = {
        **{f"M={m}": forms.tensor(m, 256) for m in (300, 512, 1, 7, 16, 0)},
        "misaligned": odd, "expanded": forms.tensor(1, 256).expand(64, 256), "3-D": forms.tensor(4, 16, 256),
        "swapped": forms.tensor(4, 16, 256).transpose(0, 1), "transposed": forms.tensor(256, 64).t(),
    }  # fmt: skip
    for name, x in calls.items():
        x = x.requires_grad_()
        found = given(lambda x=x: _step(x, supports))
        with launching(cached=False):
            wanted = given(lambda x=x: _step(x, supports))
        if found != wanted:
            answer["differ"].append(name)
    x = forms.tensor(512, 256, grad=True)
    for seed in SEEDS:
        with card.recorded() as log:
            _step(x, supports, dropout_p=0.1, seed=torch.tensor(seed if seed < 0 else [seed]))
        key = (seed % 2**64).to_bytes(8, "little")
        if sum(key in e.parameters for e in log) != 3:  # x̃ is dropped in h, in ∂B_down, and its gradient in dx
            answer["seeds"].append(seed)

    base = gk.quantize(forms.linear(256, 256), double_quant=True)
    layer = gk.GLoRALinear.from_linear(base, forms.LORA).cuda()
    found = given(lambda: forms.step(layer, x))
    answer["classes"] = len(prepared._prepared)
    again = given(lambda: forms.step(layer, x))
    answer["classes"] -= len(prepared._prepared)
    with launching(cached=False):
        if not found == again == given(lambda: forms.step(layer, x)):
            answer["differ"].append("double quantization")
    return answer


def test_both_ways_give_the_card_the_same(on_card):
    assert on_card(both_ways) == {"differ": [], "seeds": [], "classes": 0}


def smaller_card() -> list[list[int]]:
    """The programs of the large products on an H100 PCIe, of 114 multiprocessors: by programs, and as written."""
    from dry_card import card, forms
    from glora_kernels.runtime import environment
    from glora_kernels.runtime.program import launching

    environment.multiprocessors = lambda device: 114  # type: ignore[assignment]
    layer, x = forms.layer(), forms.tensor(2048, 4096, grad=True)

    def programs() -> list[int]:
        with card.recorded() as log:
            forms.step(layer, x)
        return [e.grid[0] for e in log if e.name in ("_glora_fwd_kernel", "_glora_dx_kernel")]

    found = programs()
    with launching(cached=False):
        return [found, programs()]


def test_persistent_programs_are_as_many_as_the_card_has_multiprocessors(on_card):
    assert on_card(smaller_card) == [[114, 114], [114, 114]]


def without_a_compiler() -> str:
    """The eager path's calls on a card, where nothing can be compiled; what a kernel's says."""
    import os
    import subprocess
    import tempfile

    import torch

    import glora_kernels as gk
    from glora_kernels.glora.op import glora_linear

    os.environ["CC"] = "/bin/false"

    def call(dtype: torch.dtype) -> None:
        x, w, u, d = (torch.zeros(s, dtype=dtype, device="cuda") for s in ((64, 256), (256, 256), (256, 16), (16, 256)))
        glora_linear(x.requires_grad_(), w, b_up=u.requires_grad_(), b_down=d.requires_grad_()).sum().backward()

    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        call(torch.float64)
        with gk.backend("eager"):
            call(torch.bfloat16)
        try:
            call(torch.bfloat16)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            return str(error)
    return "nothing"


def test_the_eager_path_needs_no_compiler(on_card):
    assert "/bin/false" in on_card(without_a_compiler)


def errors() -> dict[str, str]:
    """What a call that cannot be launched says, each followed by one that can."""
    import torch

    from dry_card import card, forms
    from glora_kernels.glora.op import glora_linear
    from glora_kernels.runtime import program
    from glora_kernels.runtime.direct import module

    answer = {}

    @contextlib.contextmanager
    def noted(name: str) -> Any:
        try:
            yield
            answer[name] = "nothing"
        except Exception as error:
            answer[name] = f"{type(error).__name__}: {error}"

    x, weight, supports = forms.tensor(512, 256), forms.tensor(256, 256), _lora()

    def call() -> Any:
        with torch.no_grad(), card.recorded() as log:
            glora_linear(x, weight, **supports)
        return len(log)

    launches = call()
    (one,) = program._programs.values()
    ((capsule, first, last),) = one._segments
    sized, results, run = one._kept[512], [*one._recording.twins], module().run
    memory = [t if t is None else t.data_ptr() or 1 << 62 for t in results]
    real, scratch = (x, weight), torch.empty(sized.scratch + 16, dtype=torch.uint8, device="cuda")
    made = [torch.empty(shape, dtype=dtype, device="cuda") for _, _, shape, dtype, _ in sized.made]
    operands = [*real, *[None] * (len(memory) - 2)]
    for i, twin in enumerate(one._recording.twins):
        if twin is not None and i > 1:
            operands[i] = next(t for t in supports.values() if t.shape == twin.shape)
    whole = (*operands, *made, scratch, None)
    stream, huge = 0, HUGE.to_bytes(8, "little") * (len(sized.packed) // 8)
    with card.recorded() as log:
        run(capsule, first, last, sized.packed, whole, stream, 0)
    answer["by hand"] = str(len(log) == launches)
    with noted("slots"):
        run(capsule, first, last, sized.packed, whole[:-1], stream, 0)
    with noted("arguments"):
        run(capsule, first, last)
    with noted("sizes"):
        run(capsule, first, last, huge, whole, stream, 0)
    with noted("map"):
        run(capsule, first, last, sized.packed, (whole[0], 8, *whole[2:]), stream, 0)
    with noted("no tensor"):
        run(capsule, first, last, sized.packed, ("x", *whole[1:]), stream, 0)
    with noted("stream"):
        run(capsule, first, last, sized.packed, whole, -1, 0)
    with noted("description"):
        module().prepare(((1 << 70, 128, 0, ((1, False),) * 3, ()),), 3)
    answer["afterwards"] = str(call() == launches)
    return answer


def test_errors_are_raised_and_leave_nothing_behind(on_card):
    found = on_card(errors)
    assert found.pop("by hand") == found.pop("afterwards") == "True"
    wanted = {
        "slots": "ValueError: ", "arguments": "TypeError: run takes 7", "sizes": "OverflowError: a size of 2147483649",
        "map": "RuntimeError: CUDA refused a tensor map", "no tensor": "AttributeError", "stream": "OverflowError",
        "description": "OverflowError",
    }  # fmt: skip
    assert {name: said[: len(wanted[name])] for name, said in found.items()} == wanted


def kept() -> dict[str, Any]:
    """How much memory and how many tensors there are more after many calls; the peaks of both ways."""
    import torch

    from dry_card import forms
    from glora_kernels.runtime.program import launching

    x, weight, supports = forms.tensor(512, 256, grad=True), forms.tensor(256, 256), _lora()

    def settled() -> int:
        """Autograd's own thread lets go of the gradients that it answered with a moment after the answer."""
        time.sleep(0.5)
        return torch.cuda.memory_allocated()

    def peak() -> int:
        before = settled()
        torch.cuda.reset_peak_memory_stats()
        _step(x, supports, weight=weight)
        return torch.cuda.max_memory_allocated() - before

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    peak()
    ours, memory, count = peak(), settled(), tensors()
    for _ in range(20):
        _step(x, supports, weight=weight)
    answer = {"memory": settled() - memory, "tensors": tensors() - count, "ours": ours}
    with launching(cached=False):
        return {**answer, "slow": peak()}


def test_calls_keep_nothing_and_take_no_more_memory(on_card):
    found = on_card(kept)
    assert found["memory"] == found["tensors"] == 0
    assert found["ours"] <= found["slow"] * 1.05, found  # one block, of lines


def shared() -> dict[str, Any]:
    """Threads that call one layer, whose programs are new, with many lengths; a hook of launches; other devices."""
    from triton import knobs

    from dry_card import card, forms, in_threads
    from glora_kernels.glora.op import glora_linear

    supports, weight = _lora(), forms.tensor(256, 256)
    lengths = [300, 400, 500, 512]

    def work(i: int) -> None:
        for j in range(40):
            _step(forms.tensor(lengths[(i + j) % 4], 256, grad=True), supports, weight=weight)

    with card.recorded() as log:
        wrong = in_threads(4, work)
    answer: dict[str, Any] = {"wrong": wrong, "launches": len(log)}

    x, told = forms.tensor(512, 256, grad=True), []

    def hook(metadata: Any) -> None:
        told.append(1)

    knobs.runtime.launch_enter_hook.add(hook)
    _step(x, supports, weight=weight)
    knobs.runtime.launch_enter_hook.remove(hook)
    answer["told"] = len(told)
    _step(x, supports, weight=weight)
    answer["told afterwards"] = len(told) - answer["told"]
    refused = 0
    for other in (x.detach().cpu(), x.detach().to("meta"), x.detach().to("cuda:1")):
        try:
            glora_linear(other, weight, **supports)
        except ValueError:
            refused += 1
    return {**answer, "refused": refused}


def test_threads_hooks_and_devices(on_card):
    found = on_card(shared)
    assert found == {"wrong": [], "launches": 4 * 40 * 6, "told": 6, "told afterwards": 0, "refused": 3}


def forms_in_c() -> dict[str, Any]:
    """Pairs of calls that C takes for one class and Python does not, or the other way round; what neither takes."""
    import itertools

    import torch

    from dry_card import forms
    from glora_kernels.runtime.direct import forms_of, module

    base = forms.tensor(64, 256)
    tensors = {
        "matrix": base, "its parameter": torch.nn.Parameter(base), "its like": forms.tensor(64, 256), "None": None,
        "more rows": forms.tensor(65, 256), "transposed": base.t(), "half": base[:, :128], "every other": base[::2],
        "off by 2 bytes": forms.tensor(64 * 256 + 1)[1:].view(64, 256), "fp32": base.float(), "fp16": base.half(),
        "int64": base.long(), "3-D": base.view(4, 16, 256), "3-D, other": base.view(2, 32, 256), "4-D":
        base.view(2, 2, 16, 256), "vector": base[0], "one": base[0, :1], "number": base[0, 0], "another": base[0, 1],
        "none of it": base[:0],
        "expanded": base[:1].expand(64, 256), "on the host": torch.empty(64, 256, dtype=base.dtype),
        "on meta": torch.empty(64, 256, dtype=base.dtype, device="meta"), "cuda:1": base.to("cuda:1"),
    }  # fmt: skip
    differ = []

    def key(form: Any, *call: Any) -> Any:
        try:
            return form(*call)
        except IndexError:  # a row a token, without dimensions
            return "refused"

    in_c, in_python = functools.partial(key, module().forms), functools.partial(key, forms_of)
    for flags in (b"", b"\1", b"\0\1", b"\1\1"):
        for (a, s), (b, t) in itertools.combinations(tensors.items(), 2):
            for one, other in (((s, base), (t, base)), ((base, s), (base, t)), ([s], (t,))):
                equal = in_c(one, flags) == in_c(other, flags)
                if equal != (in_python(one, flags) == in_python(other, flags)):
                    differ.append(f"{a}, {b}, {flags!r}")
    taken = []
    for tensor in (torch.sparse_coo_tensor(size=(2, 2)), "no tensor", 3):
        with contextlib.suppress(IndexError, RuntimeError, AttributeError):
            taken.append(repr(module().forms([base, tensor], b"\1")))
    return {"differ": differ, "taken": taken, "alike": len(tensors) - len({in_c([t], b"") for t in tensors.values()})}


def test_c_and_python_tell_the_same_calls_apart(on_card):
    found = on_card(forms_in_c)
    assert found == {"differ": [], "taken": [], "alike": 1}
