"""Lightning with a vision transformer of timm, in a process of its own: the cases are in `timm_child.py`.

timm needs torchvision, and torchvision one build of torch; a build that does not fit breaks transformers as well. So
the two may lie in a folder that nothing else imports from, named by GLORA_KERNELS_TIMM.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

for name in ("lightning", "peft", "sklearn"):
    pytest.importorskip(name)

CHILD = Path(__file__).with_name("timm_child.py")
FOLDER = os.environ.get("GLORA_KERNELS_TIMM")


@pytest.mark.skipif(
    not FOLDER and find_spec("timm") is None,
    reason="timm is not installed, and GLORA_KERNELS_TIMM names no folder with timm and torchvision",
)
def test_lightning_trains_a_vision_transformer(tmp_path):
    assert not FOLDER or (Path(FOLDER) / "timm").is_dir(), f"GLORA_KERNELS_TIMM={FOLDER} has no timm in it"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if FOLDER:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    command = [sys.executable, CHILD, inside]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=outside, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(outside.iterdir()), "Lightning wrote files that nobody asked for"
