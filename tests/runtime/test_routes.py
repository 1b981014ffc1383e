"""Which path serves a call: the choice, its scope, its errors, and what importing the package loads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import interpreted, problem, truth

from glora_kernels.dispatch.common import path_of
from glora_kernels.ops import glora_linear
from glora_kernels.runtime import routes
from glora_kernels.runtime.program import launching
from glora_kernels.runtime.routes import backend, chosen, explain, route
from glora_kernels.spec import GLoRAConfig


def python(code: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **changes}
    environment = {k: v for k, v in environment.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'auto', 'eager', 'triton', 'cuda'; got 'fast'"), backend("fast"):
        pass
    assert chosen() == "auto"


def test_nesting_and_exceptions():
    assert chosen() == "auto"
    with backend("eager"):
        with backend("triton"):
            assert chosen() == "triton"
        assert chosen() == "eager"
        with pytest.raises(KeyError), backend("cuda"):
            raise KeyError
        assert chosen() == "eager"
    assert chosen() == "auto"


def test_as_a_decorator():
    @backend("eager")
    def function():
        return chosen()

    assert function() == function() == "eager"
    assert chosen() == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto(dtype):
    assert route("cpu", dtype) == explain("cpu", dtype)[0] == "eager"
    assert route("meta", dtype) == "eager"
    assert route("cuda", dtype) == ("triton" if routes.environment.has_triton() else "eager")
    assert route("cuda", torch.float64) == "eager"
    assert "float64" in explain("cuda", torch.float64)[1]
    assert "'cpu'" in explain("cpu", dtype)[1]


def test_eager_serves_everything():
    with backend("eager"):
        assert {route(d, t) for d in ("cpu", "cuda") for t in (torch.float64, torch.float16)} == {"eager"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cuda_serves_no_dense_base(device):
    with backend("cuda"), pytest.raises(RuntimeError, match=r"backend\('cuda'\)"):
        route(device, torch.float32)


def test_triton_refuses_float64():
    with backend("triton"), pytest.raises(RuntimeError, match=r"float32, float16, bfloat16; got float64"):
        glora_linear(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64))


def test_triton_refuses_other_devices():
    with backend("triton"), pytest.raises(RuntimeError, match="'mps'"):
        route("mps", torch.float32)


def test_triton_on_a_cpu_without_the_interpreter():
    code = """
import torch, glora_kernels as gk
from glora_kernels.ops import glora_linear
with gk.backend("triton"):
    glora_linear(torch.zeros(2, 3), torch.zeros(4, 3))
"""
    done = python(code, TRITON_INTERPRET=None)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr.splitlines()[-1]
    assert python(code, TRITON_INTERPRET="1").returncode == 0


def test_importing_touches_nothing():
    done = python("""
import sys
import glora_kernels, glora_kernels.nn, glora_kernels.ops, glora_kernels.runtime.routes
import torch
assert not torch.cuda.is_initialized()
names = "torch._dynamo torch._inductor glora_kernels.tile glora_kernels.glora.product peft transformers"
for name in names.split():
    assert name not in sys.modules, name
""", TRITON_INTERPRET=None)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_call_on_a_cpu_loads_no_kernel():
    done = python("""
import sys, torch
from glora_kernels.ops import glora_linear
up = torch.zeros(4, 2, requires_grad=True)
glora_linear(torch.zeros(2, 3), torch.zeros(4, 3), b_up=up, b_down=torch.zeros(2, 3)).sum().backward()
assert "glora_kernels.tile" not in sys.modules
""", TRITON_INTERPRET=None)  # fmt: skip
    assert done.returncode == 0, done.stderr


@interpreted
@pytest.mark.parametrize(("at_forward", "at_backward"), [("triton", "eager"), ("eager", "triton"), ("triton", "cuda")])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_choice_is_remembered_for_backward(at_forward, at_backward, elsewhere, monkeypatch):
    """Backward may run under another choice, and in another thread."""
    used = []
    for name in ("eager", "triton"):
        path = path_of("glora", name)
        original = path.backward
        monkeypatch.setattr(path, "backward", lambda *a, n=name, f=original: used.append(n) or f(*a))
    p = problem(GLoRAConfig("vector", "lora"), (5,), 20, 11, dtype=torch.float32)
    x = p.x.requires_grad_()
    with launching(cached=False):  # so that a path is called, and no program that was planned by it
        with backend(at_forward):
            y = glora_linear(x, p.weight, p.bias, a=p.params["A"], b_up=p.params["B_up"], b_down=p.params["B_down"])
        with backend(at_backward):
            if elsewhere:
                thread = threading.Thread(target=lambda: y.backward(p.dy))
                thread.start()
                thread.join()
            else:
                y.backward(p.dy)
    assert used == [at_forward]
    assert torch.allclose(x.grad, truth(p)[0]["x"].float(), atol=1e-4)
