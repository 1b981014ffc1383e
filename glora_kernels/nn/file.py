"""The adapter file: one safetensors file, written atomically and read whole with its digest checked.

Metadata (strings): "format", "format_version", "library_version", "config" (JSON: layers, train, tied and, where
there are any, siblings) and "sha256" over the others and every tensor's name, dtype, shape and bytes: no byte changes
unnoticed. A tensor that several names share is stored under the first; "tied" maps the others to it. "siblings" lists
the sets of layers with one B_down and one dropout mask. A library that knows versions up to 1 would give them masks of
their own; a file that has siblings is of version 2, any other of version 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from glora_kernels.spec import GLoRAConfig

FORMAT = "glora_kernels.adapter"
VERSION = 2


@dataclass(frozen=True)
class LayerEntry:
    """One adapted layer: configuration, sizes, whether its base has a bias and whether that is trained."""

    config: GLoRAConfig
    in_features: int
    out_features: int
    bias: bool
    train_bias: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> LayerEntry:
        config = values["config"]
        if not isinstance(config, dict):
            raise TypeError("a layer's config is not an object")
        return cls(**{**values, "config": GLoRAConfig.from_dict(config)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds: layers by path, the paths of modules trained whole, ties, tensors, siblings."""

    layers: dict[str, LayerEntry]
    train: list[str]
    tied: dict[str, str]
    tensors: dict[str, Tensor]
    siblings: list[list[str]] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError where ties or siblings refer to what the file does not have."""
        for name, first in self.tied.items():
            if name in self.tensors or first not in self.tensors or name < first:
                raise ValueError(f"{name!r} cannot be tied to {first!r}")
        for group in self.siblings:
            factors = [f"{path}.B_down" for path in group]
            if len(group) < 2 or len({self.tied.get(name, name) for name in factors}) > 1:
                raise ValueError(f"{group} cannot be tied as siblings: they have no common B_down")

    def values(self) -> dict[str, Tensor]:
        """Every tensor under each of its names."""
        return self.tensors | {name: self.tensors[first] for name, first in self.tied.items()}


def write(adapter: Adapter, target: Path) -> None:
    """Write beside the target, flush to disk, rename: a reader sees the old file or the new one."""
    layers = {path: asdict(entry) for path, entry in adapter.layers.items()}
    config: dict[str, object] = {"layers": layers, "train": adapter.train, "tied": adapter.tied}
    if adapter.siblings:
        config["siblings"] = adapter.siblings
    header = {
        "format": FORMAT,
        "format_version": "2" if adapter.siblings else "1",
        "library_version": _library_version(),
        "config": json.dumps(config, sort_keys=True),
    }
    header["sha256"] = _digest(header, adapter.tensors)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        save_file(adapter.tensors, temporary, metadata=header)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the new name must survive a power cut too
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read(path: Path) -> Adapter:
    """The contents of a file, all checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, altered, no adapter, or of a newer format.
    """

    def bad(reason: str) -> ValueError:
        return ValueError(f"load_adapter: {str(path)!r} {reason}")

    if path.is_dir():
        raise bad("is a directory, not a file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(8)
        length = int.from_bytes(data, "little")
        if size < 8 or length > size - 8:
            raise bad(f"is truncated or no safetensors file ({size} bytes)")
        data += file.read(length)
        try:
            header = json.loads(data[8:])
            about = header.get("__metadata__", {})
        except (ValueError, AttributeError, RecursionError) as error:
            raise bad("is no safetensors file: its header is not a JSON object") from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise bad(f"is no adapter of this library: its metadata lacks format={FORMAT!r}")
        version = about.get("format_version", "")
        if not isinstance(version, str) or not version.isdecimal() or int(version) > VERSION:
            raise bad(f"has format version {version!r}; this library reads versions up to {VERSION}: upgrade it")
        data += file.read()
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise bad(f"is truncated or damaged: {error}") from error
    if about.get("sha256") != _digest(about, tensors):
        raise bad("was altered or damaged: its SHA-256 does not match its contents")
    try:
        values = json.loads(about["config"])
        layers = {name: LayerEntry.from_dict(entry) for name, entry in values["layers"].items()}
        siblings = [list(group) for group in values.get("siblings", [])]
        adapter = Adapter(layers, list(values["train"]), dict(values["tied"]), tensors, siblings)
        adapter.check()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad(f"has a configuration that cannot be used: {error}") from error
    return adapter


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata, every tensor's name, dtype and shape, then all bytes by sorted name."""
    about = {key: value for key, value in header.items() if key != "sha256"}
    names = sorted(tensors)
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([about, layout], sort_keys=True).encode())
    for name in names:
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous host tensor, of any dtype, without a copy and without NumPy."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise AssertionError("only contiguous tensors in host memory are written")
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory that shares nothing."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _library_version() -> str:
    try:
        return metadata.version("glora_kernels")
    except metadata.PackageNotFoundError:
        return "unknown"
