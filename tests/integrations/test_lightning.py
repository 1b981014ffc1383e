"""Lightning with a vision transformer of timm, in a process of its own: the cases are in `timm_child.py`.

timm needs torchvision, and torchvision one build of torch; a build that does not fit breaks transformers as well. So
the two may lie in a folder that nothing else imports from, named by GLORA_KERNELS_TIMM.
"""

from importlib.util import find_spec
from pathlib import Path

import forked
import pytest
from torchvision_apart import FOLDER, import_torchvision

for name in ("lightning", "peft", "sklearn"):
    pytest.importorskip(name)

CHILD = Path(__file__).with_name("timm_child.py")


@pytest.mark.skipif(
    not FOLDER and find_spec("timm") is None,
    reason="timm is not installed, and GLORA_KERNELS_TIMM names no folder with timm and torchvision",
)
def test_lightning_trains_a_vision_transformer(tmp_path):
    assert not FOLDER or (Path(FOLDER) / "timm").is_dir(), f"GLORA_KERNELS_TIMM={FOLDER} has no timm in it"
    outside, inside, log = tmp_path / "outside", tmp_path / "inside", tmp_path / "log.txt"
    outside.mkdir()
    before = import_torchvision if FOLDER else None
    code = forked.end_of(forked.start(CHILD, inside, out=log, folder=outside, before=before), 300)
    assert code == 0, log.read_text()
    assert not list(outside.iterdir()), "Lightning wrote files that nobody asked for"
