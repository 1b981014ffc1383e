"""A save is whole or nothing: one that fails or is killed leaves the old file."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest
from adapter_files import CFG, leftovers
from torch import nn

import glora_kernels as gk


@pytest.mark.parametrize("where", ["glora_kernels.nn.file.save_file", "os.fsync", "os.replace"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(where, trained, saved, monkeypatch, randomize):
    before = saved.read_bytes()
    randomize(trained, seed=1)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(OSError, match="no space"):
            gk.save_adapter(trained, saved)
    assert saved.read_bytes() == before
    assert leftovers(saved.parent) == ["a.safetensors"]
    gk.save_adapter(trained, saved)
    assert saved.read_bytes() != before


def test_the_target_is_complete_on_disk_before_it_gets_its_name(trained, saved, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((pathlib.Path(a), b)), replace(a, b)))
    gk.save_adapter(trained, saved)
    assert events[0] == "fsync"
    temporary, target = events[1]
    assert target == saved
    assert temporary.parent == saved.parent
    assert str(os.getpid()) in temporary.name


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
@pytest.mark.parametrize("moment", ["before the temporary file is whole", "before the rename"])
def test_a_process_killed_while_saving_leaves_the_old_file(moment, tmp_path):
    path = tmp_path / "a.safetensors"
    model = gk.inject(nn.Sequential(nn.Linear(4, 3)), CFG)
    gk.save_adapter(model, path)
    before = path.read_bytes()
    script = textwrap.dedent(
        """
        import os, signal, sys, torch
        import glora_kernels as gk
        from glora_kernels.nn import file
        path, moment = sys.argv[1:]
        model = gk.load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 3)), path)
        with torch.no_grad():
            model[0].C.fill_(1.0)
        def die(*args, **kwargs):
            if args and isinstance(args[0], dict):
                open(args[1], "wb").write(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before the rename":
            os.replace = die
        else:
            file.save_file = die
        gk.save_adapter(model, path)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(path), moment], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert path.read_bytes() == before
    assert len(leftovers(tmp_path)) == 2, "the process died while its temporary file was there"
    gk.save_adapter(model, path)
    gk.load_adapter(model, path)


def test_bad_targets(vit, trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        gk.save_adapter(trained, tmp_path / "missing" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="directory"):
        gk.save_adapter(trained, tmp_path)
    with pytest.raises(ValueError, match="no GLoRA layer"):
        gk.save_adapter(vit(), tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        gk.save_adapter({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="meta"):
        gk.save_adapter(trained.to("meta"), tmp_path / "a.safetensors")
    assert leftovers(tmp_path) == []
