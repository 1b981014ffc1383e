"""Triton's JIT for a card that is not here: it specializes and compiles as it would there, and launches nothing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

from glora_kernels.runtime.launch import Launch


class _Card:
    """Stands in for Triton's driver, with a card of one architecture. It is its own device, with its own JIT cache."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> object:
        return self

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        amd = self.arch.startswith("gfx")
        return GPUTarget("hip", self.arch, 64) if amd else GPUTarget("cuda", int(self.arch[3:]), 32)


@contextlib.contextmanager
def on_card(arch: str) -> Iterator[None]:
    """Inside, the JIT of this process compiles for a card of `arch`, from an empty cache."""
    from triton.runtime import driver

    before = driver._active  # `active` itself would look for a card here
    driver.set_active(_Card(arch))
    try:
        yield
    finally:
        driver._active = before


class Forms:
    """The forms of kernels that launches ask for. A form is what the JIT compiles separately.

    Attributes:
        found: for the key of each form, the first launch that asked for it.
    """

    def __init__(self) -> None:
        self.found: dict[str, Launch] = {}
        self._asked: list[str] = []

    def ask(self, launch: Launch) -> str | None:
        """The key of a launch's form if the form is new, else None."""
        from triton import knobs

        self._asked.clear()
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = self._hook
            launch.compiled()
        if not self._asked or self._asked[0] in self.found:
            return None
        self.found[self._asked[0]] = launch
        return self._asked[0]

    def _hook(self, *, key: object, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        self._asked.append(key_of(compile["specialization_data"]))
        fn.jit_function.device_caches[compile["device"]][0][key] = self  # so that the JIT asks once per form
        return True  # nothing is compiled


def key_of(specialization: str) -> str:
    """A short hash of a kernel's specialization, as the JIT tells its hooks, without the kernel's name and source."""
    data = json.loads(specialization)
    data["options"].pop("extern_libs", None)  # a path
    told = {name: value for name, value in data.items() if name not in ("name", "key", "target")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def compile_launch(launch: Launch) -> tuple[Any, str]:
    """The kernel that the JIT compiles for a launch on the card of `on_card`, and the log of ptxas."""
    from triton import knobs

    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = True  # a cached kernel has no log
        knobs.compilation.disable_line_info = True  # it takes a sixth of the time and adds no instruction
        knobs.nvidia.dump_ptxas_log = True
        compiled = launch.compiled()
    return compiled, log.getvalue()
