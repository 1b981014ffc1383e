"""The one reused buffer."""

from __future__ import annotations

import threading

import pytest
import torch

from glora_kernels.runtime.workspace import release, workspace_like


@pytest.fixture(autouse=True)
def fresh():
    release()
    yield
    release()


def meta(*shape):
    return torch.empty(shape, device="meta")


def test_shape_dtype_and_layout():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        view = workspace_like(torch.zeros(7, 5).t(), dtype)
        assert (view.shape, view.dtype, view.device.type) == ((5, 7), dtype, "cpu")
        assert view.is_contiguous()


def test_it_grows_and_never_shrinks():
    big = workspace_like(torch.zeros(64, 64), torch.float32).data_ptr()
    assert workspace_like(torch.zeros(8, 8), torch.float64).data_ptr() == big
    assert workspace_like(torch.zeros(64, 64), torch.float32).data_ptr() == big
    workspace_like(torch.zeros(64, 64), torch.float64)
    bigger = workspace_like(torch.zeros(64, 64), torch.float64)
    assert bigger.numel() == 64 * 64
    bigger.fill_(1)
    assert workspace_like(torch.zeros(2, 2), torch.float64).eq(1).all()


def test_release_frees_it():
    workspace_like(torch.zeros(64, 64), torch.float32).fill_(7)
    release()
    assert workspace_like(torch.zeros(64, 64), torch.float32).untyped_storage().nbytes() == 64 * 64 * 4
    release()
    assert workspace_like(torch.zeros(2, 2), torch.float32).untyped_storage().nbytes() == 16


def test_other_devices_get_their_own():
    assert workspace_like(meta(3, 4), torch.bfloat16).device.type == "meta"


def test_threads_never_share():
    weight, found, barrier = torch.zeros(16, 16), [], threading.Barrier(4)

    def work(value):
        view = workspace_like(weight, torch.float32).fill_(value)
        barrier.wait()
        found.append((bool((view == value).all()), view.data_ptr()))
        barrier.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(kept for kept, _ in found)
    assert len({address for _, address in found}) == 4
