"""The card itself: it says no where a card would."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl


@triton.jit
def _copy_kernel(to, of, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(of + at, at < N), at < N)


@triton.jit
def _copy_map_kernel(to, of):
    to.store([0, 0], of.load([0, 0]))


def refusals() -> dict[str, str]:
    """What is said to each wrong thing; "" where it was done."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from dry_card import card

    x, other = torch.ones(1024, device="cuda"), torch.ones(1024, device="cuda:1")
    image = torch.ones(64, 64, device="cuda")
    gone = torch.ones(1024, device="cuda").as_strided((1024,), (1,))
    stale = torch.ones(3 << 20, device="cuda")
    freed = stale.data_ptr()
    del stale

    class Address:
        """A pointer that somebody kept."""

        dtype = torch.float32

        def data_ptr(self) -> int:
            return freed

    def copy(to, of, grid=(1,)) -> None:
        _copy_kernel[grid](to, of, 1024, BLOCK=1024)

    def on_another_device() -> None:
        with torch.cuda.device(1):
            copy(x, x)

    def copy_by_maps() -> None:
        described = TensorDescriptor.from_tensor(image, [16, 16])
        _copy_map_kernel[(1,)](described, described)

    def captured(what: Callable[[], object]) -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            what()

    tries: dict[str, Callable[[], object]] = {
        "a copy": lambda: copy(x, gone),
        "a grid": lambda: copy(x, x, (1, 70000)),
        "freed memory": lambda: copy(x, Address()),
        "another device's memory": lambda: copy(x, other),
        "another device": on_another_device,
        "maps": copy_by_maps,
        "a captured read": lambda: captured(x.sum().item),
        "a captured copy to the host": lambda: captured(x.cpu),
        "a captured wait": lambda: captured(torch.cuda.synchronize),
        "a captured kernel": lambda: captured(lambda: copy(x, gone)),
        "a read after capture": lambda: x.sum().item(),
        "tensors of two devices": lambda: x + other,
        "a copy between devices": lambda: other.copy_(x),
    }
    said = {}
    for name, what in tries.items():
        try:
            what()
            said[name] = ""
        except (RuntimeError, ValueError, AssertionError) as error:
            said[name] = str(error)
            card.device.set_capturing(False)
    return said


def test_the_card_refuses_what_a_card_refuses(on_card):
    said = on_card(refusals)
    done = {name for name, words in said.items() if not words}
    assert done == {"a copy", "maps", "a captured kernel", "a read after capture", "a copy between devices"}, said
    assert "no such grid" in said["a grid"]
    assert "freed memory" in said["freed memory"]
    assert "another device" in said["another device's memory"]
    assert "another device" in said["another device"]
    assert all("capturing" in said[name] for name in said if name.startswith("a captured") and said[name])


def maps() -> dict[str, bool]:
    """Which tensor maps of a bf16 matrix of 64 x 64 the driver makes, found as a launcher in C finds it."""
    import ctypes

    import torch

    from dry_card import forms

    driver, matrix = ctypes.CDLL("libcuda.so.1"), forms.tensor(64, 64)
    made = (ctypes.c_uint64 * 32)()

    def make(offset: int = 0, stride: int = 128, box: int = 64, swizzle: int = 3, rows: int = 64) -> bool:
        def numbers(*values: int, of: type = ctypes.c_uint64) -> ctypes.Array:
            return (of * len(values))(*values)

        address, small = ctypes.c_void_p(matrix.data_ptr() + offset), ctypes.c_uint32
        boxes, steps = numbers(box, 16, of=small), numbers(1, 1, of=small)
        refused = driver.cuTensorMapEncodeTiled(
            made, 9, 2, address, numbers(64, rows), numbers(stride), boxes, steps, 0, swizzle, 0, 0
        )  # fmt: skip
        return not refused and made[0] == address.value

    found = {
        "plain": make(), "offset by 8 bytes": make(offset=8), "odd stride": make(stride=136), "no rows": make(rows=0),
        "rows that overlap": make(stride=64), "a box wider than the swizzle": make(swizzle=2),
        "a box of 512": make(box=512, swizzle=0), "a narrow box": make(box=4),
    }  # fmt: skip
    other = torch.empty_like(matrix)
    driver.cuTensorMapReplaceAddress(made, ctypes.c_void_p(other.data_ptr()))
    return {**found, "another address": made[0] == other.data_ptr()}


def test_tensor_maps_obey_the_rules_of_the_driver(on_card):
    found = on_card(maps)
    assert {name for name, made in found.items() if made} == {"plain", "another address"}


def written() -> dict[str, object]:
    """What the log holds of one launch, and PyTorch's operations on both devices."""
    import torch

    from dry_card import card

    x, to = torch.arange(1024.0, device="cuda"), torch.empty(1024, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), card.recorded() as log:
        _copy_kernel[(3, 2)](to, x, 777, BLOCK=1024, num_warps=2)
    (launch,) = log
    numbers = [int.from_bytes(p, "little") for p in launch.parameters]
    moved = x.to("cuda:1") + 1
    return {
        "name": launch.name, "grid": launch.grid, "threads": launch.threads,
        "stream": launch.stream == stream.cuda_stream,
        "parameters": numbers[:3] == [to.data_ptr(), x.data_ptr(), 777], "sizes": [len(p) for p in launch.parameters],
        "local": launch.local_bytes, "registers": launch.registers > 0, "code": launch.machine_code()[:4].hex(),
        "moved": [str(moved.device), moved.sum().item()], "view": x[3:].view(-1).data_ptr() - x.data_ptr(),
    }  # fmt: skip


def test_the_log_holds_what_was_launched(on_card):
    assert on_card(written) == {
        "name": "_copy_kernel", "grid": [3, 2, 1], "threads": 64, "stream": True, "parameters": True,
        "sizes": [8, 8, 4, 8, 8], "local": 0, "registers": True, "code": b"\x7fELF".hex(),
        "moved": ["cuda:1", 1023 * 1024 / 2 + 1024], "view": 12,
    }  # fmt: skip
