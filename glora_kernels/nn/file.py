"""The adapter file: one safetensors file, written atomically and read whole with its digest checked.

Metadata (strings): "format", "format_version", "library_version", "config" (JSON: layers, train, tied and, where
there are any, siblings) and "sha256" over the other entries and every tensor's name, dtype, shape and bytes. A tensor
with several names is stored under the first; "tied" maps the others to it. "siblings" lists the sets of layers with one
B_down and one dropout mask. A file with siblings has version 2, because a library that reads only version 1 would give
each layer its own mask. One with layers of experts has version 3: each of its layers says its number of experts (0: a
linear layer) and which parameters its experts have in common. One with convolutions has version 4: each of its layers
says these two and its kernel ([]: a linear layer). Any other file has version 1. A layer's config has later fields
(`spec.LATER`) only where they are set: earlier libraries refuse a file with a field that they do not know, and read all
others.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from sys import float_info
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from glora_kernels.nn.model import join
from glora_kernels.spec import LATER, SCALED, SUPPORTS, GLoRAConfig

FORMAT = "glora_kernels.adapter"

Schema = Mapping[str, tuple[type, ...]]
"""The keys of a JSON object and the exact types of their values after json.loads: a bool does not count as an int."""

VERSIONS: Mapping[str, Schema] = {
    "1": {"layers": (dict,), "train": (list,), "tied": (dict,)},
    "2": {"layers": (dict,), "train": (list,), "tied": (dict,), "siblings": (list,)},
    "3": {"layers": (dict,), "train": (list,), "tied": (dict,), "siblings": (list,)},
    "4": {"layers": (dict,), "train": (list,), "tied": (dict,), "siblings": (list,)},
}
"""The schema of "config" in each version of the format."""

ENTRY: Schema = {
    "config": (dict,), "in_features": (int,), "out_features": (int,), "bias": (bool,), "train_bias": (bool,),
}  # fmt: skip
FURTHER: Mapping[str, Schema] = {
    "3": {"experts": (int,), "common": (list,)},
    "4": {"experts": (int,), "common": (list,), "kernel": (list,)},
}
"""The further keys of a layer, by version."""
CONFIG: Schema = dict.fromkeys((*SUPPORTS, "variant", "init"), (str,)) | {
    "rank": (int,), "alpha": (int, float, type(None)), "dropout": (int, float),
}  # fmt: skip
SET: Schema = dict.fromkeys(LATER, (int, float))
"""Fields of a layer's "config" that are there only where they are set."""
TENSOR: Schema = {"dtype": (str,), "shape": (list,), "data_offsets": (list,)}


@dataclass(frozen=True)
class LayerEntry:
    """One adapted layer: configuration, sizes, whether the base has a bias, and whether the bias is trained.

    experts: the number of a layer of experts; 0 for a linear layer. common: the parameters that all experts share.
    kernel: of a convolution, whose in_features are channels; empty for a linear layer.
    """

    config: GLoRAConfig
    in_features: int
    out_features: int
    bias: bool
    train_bias: bool
    experts: int = 0
    common: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapter's parameters, without a trained bias."""
        return tuple(self.config.parameter_shapes(1, 1, self.bias))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's saved tensors, by name."""
        sizes = self.in_features, self.out_features, self.bias
        of_bias = (self.experts, self.out_features) if self.experts else (self.out_features,)
        trained: dict[str, tuple[int, ...]] = {"bias": of_bias} if self.train_bias else {}
        return self.config.parameter_shapes(*sizes, self.experts, self.common, self.kernel) | trained

    def to_dict(self, version: str) -> dict[str, Any]:
        values = asdict(self) | {"config": self.config.to_dict()}
        return {name: values[name] for name in (*ENTRY, *FURTHER.get(version, ()))}

    @classmethod
    def parsed(cls, values: object, what: str, version: str) -> LayerEntry:
        found = _fields(values, {**ENTRY, **FURTHER.get(version, {})}, what)
        here = _typed(found["config"], (dict,), f"the config of {what}")
        config = _fields(here, {**CONFIG, **{key: SET[key] for key in SET if key in here}}, f"the config of {what}")
        for name in SCALED:
            if (alpha := config.get(name)) is not None and not -float_info.max <= alpha <= float_info.max:
                raise ValueError(f"the {name} of {what} is no finite number")
        if found["in_features"] < 0 or found["out_features"] < 0:
            raise ValueError(f"{what} has a negative size")
        if "experts" in found:
            found["common"] = tuple(_strings(found["common"], f"common of {what}"))
            if found["experts"] < 0 or found["experts"] == 1:
                raise ValueError(f"{what} has a number of experts that no layer has")
        if "kernel" in found:
            found["kernel"] = tuple(_typed(size, (int,), f"a size of the kernel of {what}") for size in found["kernel"])
            if len(found["kernel"]) > 3 or any(size < 1 for size in found["kernel"]):
                raise ValueError(f"{what} has a kernel that no layer has: {list(found['kernel'])}")
        if found["train_bias"] and not found["bias"]:
            raise ValueError(f"{what} trains a bias that it does not have")
        entry = cls(**found | {"config": GLoRAConfig.from_dict(config)})
        if not set(entry.common) <= (entry.config.parameter_shapes(1, 1).keys() if entry.experts else set()):
            raise ValueError(f"{what} has parameters common to its experts that it does not have")
        return entry


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter file: layers by path, paths of modules trained whole, ties, tensors, siblings."""

    layers: dict[str, LayerEntry]
    train: list[str]
    tied: dict[str, str]
    tensors: dict[str, Tensor]
    siblings: list[list[str]] = field(default_factory=list)

    @classmethod
    def parsed(cls, text: str, version: str, tensors: dict[str, Tensor]) -> Adapter:
        """Parse and check "config".

        Raises:
            ValueError: it is no JSON, a key is missing or unknown, a value has another type, or ties or siblings refer
                to tensors or layers that the file does not have.
        """
        found = _fields(_json(text), VERSIONS[version], "the configuration")
        layers = {path: LayerEntry.parsed(entry, f"layer {path!r}", version) for path, entry in found["layers"].items()}
        if not layers:
            raise ValueError("it has no layers")
        train = _strings(found["train"], "train")
        _strings(found["tied"].values(), "tied", distinct=False)
        siblings = [
            _strings(_typed(group, (list,), "a set of siblings"), "siblings") for group in found.get("siblings", [])
        ]
        _strings([path for group in siblings for path in group], "siblings")
        adapter = cls(layers, train, found["tied"], tensors, siblings)
        adapter.check()
        return adapter

    def check(self) -> None:
        """Raise a ValueError where ties or siblings refer to tensors or layers that the file does not have."""
        for name, first in self.tied.items():
            if name in self.tensors or first not in self.tensors or name < first:
                raise ValueError(f"{name!r} cannot be tied to {first!r}")
        for group in self.siblings:
            if unknown := [path for path in group if path not in self.layers]:
                raise ValueError(f"the sibling {unknown[0]!r} is no layer")
            factors = [join(path, "B_down") for path in group]
            common = {self.tied.get(name, name) for name in factors}
            if len(group) < 2 or len(common) > 1 or not common <= self.tensors.keys():
                raise ValueError(f"{group} cannot be tied as siblings: they have no common B_down")

    def values(self) -> dict[str, Tensor]:
        """Every tensor under each of its names."""
        return self.tensors | {name: self.tensors[first] for name, first in self.tied.items()}


def write(adapter: Adapter, target: Path) -> None:
    """Write the file of an adapter."""
    experts = any(entry.experts for entry in adapter.layers.values())
    convolutions = any(entry.kernel for entry in adapter.layers.values())
    version = "4" if convolutions else "3" if experts else "2" if adapter.siblings else "1"
    layers = {path: entry.to_dict(version) for path, entry in adapter.layers.items()}
    config: dict[str, object] = {"layers": layers, "train": adapter.train, "tied": adapter.tied}
    if "siblings" in VERSIONS[version]:
        config["siblings"] = adapter.siblings
    header = {
        "format": FORMAT,
        "format_version": version,
        "library_version": _library_version(),
        "config": json.dumps(config, sort_keys=True),
    }
    header["sha256"] = digest(header, adapter.tensors)
    save_tensors(target, adapter.tensors, header)


def save_tensors(target: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a temporary file in the target's directory, flush it to disk, rename it: readers see the old or the new."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata=header)
        with open(temporary, "rb+") as file:
            _order_metadata(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    flush_folder(target.parent)


def _order_metadata(file: BinaryIO) -> None:
    """Sort the metadata of a safetensors file, in whose random order equal adapters would be different files."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    if len(text) != length:
        raise AssertionError("the header of a safetensors file is written in another way than JSON without spaces")
    file.seek(8)
    file.write(text)


def flush_folder(folder: Path) -> None:
    """Flush a folder to disk, where the system can: the name of a new file in it must survive a power cut too."""
    if os.name == "posix":
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@dataclass(frozen=True)
class Foreign:
    """The place, metadata and tensors of a file that another tool wrote."""

    path: Path
    about: dict[str, str]
    tensors: dict[str, Tensor]


def read(path: Path, is_foreign: Callable[[Iterable[str]], bool], caller: str = "load_adapter") -> Adapter | Foreign:
    """Read a file and check everything in it; of another tool's, that it is whole.

    Args:
        path: the file.
        is_foreign: whether tensors of these names, in a file that is not ours, are an adapter of another tool.
        caller: for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, altered, no adapter, or of a newer format.
    """

    def bad(reason: str) -> ValueError:
        return ValueError(f"{caller}: {str(path)!r} {reason}")

    if path.exists() and not path.is_file():
        raise bad("is a directory, not a file" if path.is_dir() else "is no regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(8)
        length = int.from_bytes(data, "little")
        if size < 8 or length > size - 8:
            raise bad(f"is truncated or no safetensors file ({size} bytes)")
        data += file.read(length)
        try:
            about, names = _header(data[8:])
        except ValueError as error:
            raise bad(f"is truncated or no safetensors file: {error}") from error
        ours = about.get("format") == FORMAT
        if not ours and not is_foreign(names):
            raise bad(
                f"is no adapter of this library: its metadata lacks format={FORMAT!r}; nor does it have the keys of "
                "LyCORIS's GLoRA (.a1.weight, ...) or of LoRA (.lora_down.weight, .lora_A.weight, ...)"
            )
        if (version := about.get("format_version", "")) not in VERSIONS and ours:
            raise bad(f"has format version {version!r}; this library reads {', '.join(VERSIONS)}: upgrade it")
        data += file.read()
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a dtype that PyTorch does not have
        raise bad(f"is truncated or damaged: {error}") from error
    if not ours:
        return Foreign(path, about, tensors)
    if about.get("sha256") != digest(about, tensors):
        raise bad("was altered or damaged: its SHA-256 does not match its contents")
    try:
        return Adapter.parsed(about.get("config", ""), version, tensors)
    except ValueError as error:
        raise bad(f"has a configuration that cannot be used: {error}") from error


def _header(header: bytes) -> tuple[dict[str, str], list[str]]:
    """The metadata and the names of the tensors in a safetensors header, after checking the form of every entry."""
    entries = _typed(_json(header), (dict,), "its header")
    about = _typed(entries.pop("__metadata__", {}), (dict,), "its metadata")
    _strings(about.values(), "metadata", distinct=False)
    for name, entry in entries.items():
        count = 1
        for size in _fields(entry, TENSOR, f"tensor {name!r}")["shape"]:
            count *= max(_typed(size, (int,), f"a size of tensor {name!r}"), 1)
            if size < 0 or count >= 2**63:  # a tensor without elements has strides too
                raise ValueError(f"tensor {name!r} has a shape that no tensor has")
    return about, list(entries)


def _json(text: str | bytes) -> Any:
    """Parse JSON; repeated keys and NaN, which Python's parser accepts, are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _typed(value: Any, types: tuple[type, ...], what: str) -> Any:
    if type(value) not in types:
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise ValueError(f"{what} must be of type {names}, got {type(value).__name__}")
    return value


def _fields(value: object, schema: Schema, what: str) -> dict[str, Any]:
    """Check that a value is a JSON object with exactly the keys and types of a schema, and return it."""
    found: dict[str, Any] = _typed(value, (dict,), what)
    if found.keys() != schema.keys():
        raise ValueError(f"{what} must have the keys {sorted(schema)}, got {sorted(found)}")
    for key, types in schema.items():
        _typed(found[key], types, f"{key} of {what}")
    return found


def _strings(values: Iterable[object], what: str, distinct: bool = True) -> list[str]:
    found: list[str] = [_typed(value, (str,), f"a value of {what}") for value in values]
    if distinct and len(set(found)) < len(found):
        raise ValueError(f"{what} names something twice")
    return found


def digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata, then every tensor's name, dtype and shape, then the bytes in the order of names."""
    about = {key: value for key, value in header.items() if key != "sha256"}
    names = sorted(tensors)
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    found = hashlib.sha256(json.dumps([about, layout], sort_keys=True).encode())
    for name in names:
        found.update(memory_of(tensors[name]))
    return found.hexdigest()


def memory_of(tensor: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous host tensor, of any dtype, without a copy and without NumPy."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise AssertionError("only contiguous tensors in host memory are written")
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, also of a tensor that is there already."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _library_version() -> str:
    try:
        return metadata.version("glora_kernels")
    except metadata.PackageNotFoundError:
        return "unknown"
