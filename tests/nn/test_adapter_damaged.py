"""A file that is damaged, altered or no adapter is refused by name, and the model stays as it was."""

import json
import struct

import pytest
import torch
from adapter_files import contents, refused
from safetensors.torch import save_file
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig


def test_missing_files_and_directories(vit, tmp_path):
    refused(vit(), tmp_path / "none.safetensors", "none.safetensors", FileNotFoundError)
    refused(vit(), tmp_path, "directory")


def test_truncated_files(vit, saved):
    data = saved.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for size in (0, 5, 8, 100, header - 1, header, header + 10, len(data) - 1):
        saved.write_bytes(data[:size])
        refused(vit(), saved, r"a\.safetensors.*(truncated|damaged)")
    saved.write_bytes(data + b"\0")
    refused(vit(), saved, "damaged")


def test_every_flipped_byte_is_noticed(tmp_path, randomize):
    path = tmp_path / "a.safetensors"
    gk.save_adapter(randomize(gk.inject(nn.Sequential(nn.Linear(2, 2)), GLoRAConfig.lora(1))), path)
    data = bytearray(path.read_bytes())
    plain = nn.Sequential(nn.Linear(2, 2))
    for i in range(len(data)):
        data[i] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            gk.load_adapter(plain, path)
        data[i] ^= 1
    assert type(plain[0]) is nn.Linear
    path.write_bytes(data)
    gk.load_adapter(plain, path)


def rewrite(path, tensors=None, **changes):
    """The file again, with changed tensors or metadata and the digest as it was."""
    old, metadata = contents(path)
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    save_file(old if tensors is None else tensors, path, metadata=metadata)


def test_altered_contents(vit, saved):
    data = saved.read_bytes()
    tensors, metadata = contents(saved)
    name = "blocks.0.attn.q_proj.B_up"
    rewrite(saved, tensors | {name: tensors[name] + 1e-7})
    refused(vit(), saved, "SHA-256")
    renamed = {key.replace("q_proj", "x_proj"): value for key, value in tensors.items()}
    rewrite(saved, renamed)
    refused(vit(), saved, "SHA-256")
    rewrite(saved, tensors | {name: tensors[name].reshape(2, 16)})
    refused(vit(), saved, "SHA-256")
    saved.write_bytes(data)
    rewrite(saved, config=metadata["config"].replace('"alpha": 6', '"alpha": 9'))
    refused(vit(), saved, "SHA-256")
    saved.write_bytes(data)
    rewrite(saved, sha256=None)
    refused(vit(), saved, "SHA-256")


def test_foreign_files(vit, saved):
    tensors, _ = contents(saved)
    rewrite(saved, format_version="5")
    refused(vit(), saved, "'5'.*reads 1, 2, 3, 4")
    rewrite(saved, format_version="one")
    refused(vit(), saved, "'one'")
    rewrite(saved, format="pt")
    refused(vit(), saved, r"a\.safetensors.*no adapter")
    save_file(tensors, saved)
    refused(vit(), saved, "no adapter")
    torch.save(tensors, saved)
    refused(vit(), saved, "safetensors")
    saved.write_bytes(struct.pack("<Q", 4) + b"[{}]")
    refused(vit(), saved, "safetensors")


def forge(path, change):
    """A file whose digest is right and whose configuration is not."""
    from glora_kernels.nn import file

    tensors, metadata = contents(path)
    values = json.loads(metadata["config"])
    values = change(values) or values
    metadata["config"] = json.dumps(values, sort_keys=True)
    metadata["sha256"] = file.digest(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("layers") and None,
        lambda values: values["layers"]["embed"].pop("bias") and None,
        lambda values: values["layers"]["embed"].update(extra=1),
        lambda values: values["layers"]["embed"]["config"].update(A="dense"),
        lambda values: values["layers"]["embed"]["config"].update(rank=0),
        lambda values: values["layers"]["embed"].update(config="lora"),
        lambda values: values["tied"].update({"a.b": "c.d"}),
        lambda values: values["tied"].update({"a.b": "embed.B_up"}),
        lambda values: values["tied"].update({"embed.B_up": "embed.B_down"}),
        lambda values: ["a list"],
    ],
)
def test_unusable_configurations(change, vit, saved):
    forge(saved, change)
    refused(vit(), saved, r"a\.safetensors.*configuration that cannot be used")
