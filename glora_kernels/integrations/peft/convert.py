"""Converting checkpoints of PEFT's GLoRA, and files of other tools, into ours and back: the same under other names.

    PEFT's   glora_A.Xd (N,R)  glora_A.Xu (R,K)  glora_A.X (N,1) or (1,)  glora_C.Xd (K,R)  glora_C.X (K,1)  ...
    ours     A_up              A_down            A (N,)   or (1,)         C_up              C (K,)           ...

PEFT's GLoRA has one form for A and B, one for D and E, no alpha, and no C, D or E on a layer without a bias; absent
supports are stored as zeros ("glora_D.zeros").
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glora_kernels.integrations.peft.config import FORMAT, GLoRAPeftConfig
from glora_kernels.integrations.peft.foreign import checkpoint_of, parts_of, read_file, write_file
from glora_kernels.nn.formats.places import Prefix
from glora_kernels.spec import SUPPORTS, GLoRAConfig

Layers = dict[str, dict[str, Tensor]]
"""The parameters of each layer, by its path in the checkpoint and then by name."""

_THEIRS = re.compile(r"(?P<path>.+)\.glora_(?P<name>[A-E]\.(?:Xd|Xu|X|zeros))")
_OURS = re.compile(r"(?P<path>.+)\.gkglora_adapter\.(?P<name>[A-E](?:_up|_down)?)")
_PARTS = {"Xd": "_up", "Xu": "_down", "X": ""}
_FORMS = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}
"""Support → the field of PEFT's configuration that has its form."""
_COMMON = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "r",
    "target_modules", "modules_to_save",
)  # fmt: skip
_N, _K = -1, -2  # placeholders for unknown sizes


def convert_checkpoint(
    source_dir: str | Path,
    target_dir: str | Path,
    *,
    every_layer_has_bias: bool = False,
    format: str | None = None,
    model: nn.Module | None = None,
    prefix: Prefix = None,
    rs_lora: bool | None = None,
) -> None:
    """Convert a checkpoint of PEFT's GLoRA, or an adapter file of another tool, to one of ours, or the reverse.

        PEFT's "GLORA" folder        ↔  our "GKGLORA" folder      the `peft_type` of the source decides
        file of another tool         →  our "GKGLORA" folder      LyCORIS GLoRA, LoRA; with model=
        file of save_adapter         →  our "GKGLORA" folder
        either of these two of ours  →  file of another tool      format="lycoris", "kohya" or "peft"

    Both make a model compute the same. PEFT's form can only express: A and B in one form, D and E in one form, no
    patterns, no scale, no dropout, the elementwise variant, and no C, D or E on layers without a bias. What a file of
    another tool can express is said at `save_adapter`. Other tensors of a folder (`modules_to_save`, trained biases)
    are copied to a folder.

    Args:
        source_dir: a folder with adapter_config.json and adapter_model.safetensors, or a safetensors file: of another
            tool, or of `save_adapter`.
        target_dir: the folder, or with a format the file, to write; it must not exist. It is written completely or not
            at all.
        every_layer_has_bias: True confirms that all layers have a bias. Needed only towards PEFT for C without D,
            where the checkpoint does not show it.
        format: of the file to write, as in `save_adapter`; None: a folder is written.
        model: the base model, for the names in a file of another tool; on the meta device, if you like.
        prefix: of the names in a file of another tool that is read (`load_adapter`) or written (`save_adapter`).
        rs_lora: of a file of LyCORIS, as in `load_adapter`.

    Raises:
        FileNotFoundError: there is no source, or it lacks one of the two files.
        FileExistsError: the target exists.
        ValueError: a file that cannot be read, or holds NaN, inf, or parameters that do not fit its configuration; a
            source of another method or a newer format, or one that the other form cannot express.

    Examples:
        >>> from peft import GloraConfig, get_peft_model
        >>> from glora_kernels.integrations.peft import convert_checkpoint
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), GloraConfig(target_modules=["0"]))
        >>> model.save_pretrained("peft-glora")
        >>> convert_checkpoint("peft-glora", "ours")
    """
    source, target = Path(source_dir), Path(target_dir)
    if target.exists():
        raise FileExistsError(f"{target} exists; give a {'file' if format else 'folder'} that does not")
    if source.is_file():
        _from_file(source, target, format, model, prefix, rs_lora)
        return
    if model is not None or rs_lora is not None or (prefix is not None and format is None):
        raise ValueError(f"model, prefix and rs_lora are for a file of another tool, and {source} is none")
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} has no {name}; a checkpoint in another form is to be saved again first")
    config, tensors = _read_config(source / CONFIG_NAME), _read_tensors(source / SAFETENSORS_WEIGHTS_NAME)
    kind = config.get("peft_type")
    try:
        if format is not None:
            _to_file(target, config, tensors, format, prefix)
            return
        if kind == "GLORA":
            config, tensors = _from_peft(config, tensors)
        elif kind == "GKGLORA":
            config, tensors = _to_peft(config, tensors, every_layer_has_bias)
        else:
            raise ValueError(f"peft_type must be 'GLORA' or 'GKGLORA', got {kind!r}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    _write_folder(target, config, tensors)


def _from_file(
    source: Path, target: Path, format: str | None, model: nn.Module | None, prefix: Prefix, rs_lora: bool | None
) -> None:
    """Convert a file of another tool to a folder, or one of ours to either."""
    try:
        if format is None:
            made, layers = checkpoint_of(read_file(source, model, prefix, rs_lora))
            named = {f"base_model.model.{path}": stored for path, stored in layers.items()}
            _write_folder(target, _plain(made), _joined(named, "gkglora_adapter."))
        else:
            if model is not None or rs_lora is not None:
                raise ValueError(
                    f"format={format!r} is written from a file of ours or a folder; load a file of another tool by "
                    "load_adapter, and save it by save_adapter"
                )
            adapter = read_file(source, None, None, None)
            kernels = {path: entry.kernel for path, entry in adapter.layers.items()}
            write_file(target, *parts_of(adapter), format, prefix, kernels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _to_file(
    target: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], format: str, prefix: Prefix
) -> None:
    """Convert a "GKGLORA" checkpoint to a file."""
    if (kind := values.get("peft_type")) != "GKGLORA":
        raise ValueError(f"with format={format!r} peft_type must be 'GKGLORA', got {kind!r}; convert it to that first")
    config = GLoRAPeftConfig(**values)
    stored, rest = _split(tensors, _OURS)
    _check_shapes(config, stored)
    layers = {_module(path): own for path, own in stored.items()}
    write_file(target, config.layer_configs(list(layers)), layers, rest, format, prefix, {})


def _write_folder(target: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint completely or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{uuid4().hex}")
    temporary.mkdir()
    try:
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True))
        save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object with the fields of a configuration, got {config!r:.60}")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {key!r} holds NaN or inf")
    return tensors


def _from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    known = {*_COMMON, *_FORMS.values(), "peft_type", "bias", "init_weights"}
    if unknown := sorted(name for name in config if name not in known and config[name] is not None):
        raise ValueError(f"this GLoRA configuration has fields of a version of PEFT that is not known: {unknown}")
    if absent := sorted(set(_FORMS.values()) - set(config)):
        raise ValueError(f"{CONFIG_NAME} has no {', '.join(absent)}")
    layers, rest = _split(tensors, _THEIRS)
    forms = {letter: config[field] for letter, field in _FORMS.items()}
    bare = []  # layers without a bias: PEFT drops their C, D and E
    for path, stored in layers.items():
        missing = {letter for letter in SUPPORTS if forms[letter] != "none" and f"{letter}.zeros" in stored}
        if missing - set("CDE"):
            raise ValueError(
                f"{path}: the configuration has {sorted(missing)}, the checkpoint has zeros in their place"
            )
        if missing:
            bare.append(path)
    none = dict.fromkeys("CDE", "none")
    patterns: dict[str, dict[str, str]] = {}
    if len(bare) < len(layers):
        # Longer paths first, since a pattern "fc" would also match "block.fc".
        for path in sorted(layers, key=lambda path: -path.count(".")):
            module = _module(path)
            if path in bare:
                patterns[module] = dict(none)
            elif any(_module(other) == module.rpartition(".")[2] for other in bare):
                patterns[module] = {}
    made = GLoRAPeftConfig(
        **{name: config[name] for name in _COMMON if name in config},
        **(forms | none if len(bare) == len(layers) else forms),
        bias="gkglora_only" if config.get("bias") == "glora_only" else config.get("bias", "none"),
        init="kaiming",
        patterns=patterns or None,
    )
    ours = {path: _our_tensors(stored) for path, stored in layers.items()}
    _check_shapes(made, ours)
    return _plain(made), rest | _joined(ours, "gkglora_adapter.")


def _to_peft(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], every_layer_has_bias: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = GLoRAPeftConfig(**values)
    s = 1.0 if config.alpha is None else config.alpha / config.r
    reasons = [
        ("A and B in one form", config.A == config.B, f"A={config.A!r} and B={config.B!r}"),
        ("D and E in one form", config.D == config.E, f"D={config.D!r} and E={config.E!r}"),
        ("one setting for all layers", not config.patterns, "patterns"),
        ("no scale", s == 1.0, f"alpha={config.alpha!r} with r={config.r}"),
        ("no scale", config.alpha_A in (None, config.r), f"alpha_A={config.alpha_A!r} with r={config.r}"),
        ("no dropout", config.dropout == 0.0, f"dropout={config.dropout!r}"),
        ("the elementwise variant", config.variant == "hadamard", f"variant={config.variant!r}"),
        ("no exclude_modules", not config.exclude_modules, "exclude_modules"),
        ("all layers or none", config.layers_to_transform is None, "layers_to_transform"),
    ]
    for has, met, given in reasons:
        if not met:
            raise ValueError(f"PEFT's GLoRA has {has}, and this checkpoint has {given}")
    layers, rest = _split(tensors, _OURS)
    _check_shapes(config, layers)
    if config.D != "none" and (bare := [path for path, stored in layers.items() if "D" not in stored]):
        raise ValueError(f"PEFT's GLoRA drops C, D and E on layers without a bias, as {_module(bare[0])!r} is here")
    if config.D == "none" and config.C != "none" and not every_layer_has_bias:
        raise ValueError(
            f"PEFT's GLoRA drops C on layers without a bias, and C={config.C!r} with D='none' does not show whether "
            "these have one; if all of them have, say so: every_layer_has_bias=True"
        )
    made = {name: value for name, value in _plain(config).items() if name in _COMMON} | {
        "peft_type": "GLORA",
        "bias": "glora_only" if config.bias == "gkglora_only" else config.bias,
        **{field: getattr(config, letter) for letter, field in _FORMS.items()},
        "init_weights": True,
    }
    form = config.layer_config()
    return made, rest | _joined({path: _their_tensors(form, ours) for path, ours in layers.items()}, "glora_")


def _split(tensors: Mapping[str, Tensor], names: re.Pattern[str]) -> tuple[Layers, dict[str, Tensor]]:
    """The parameters of the adapter, layer by layer, and everything else."""
    layers: Layers = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if found := names.fullmatch(key):
            if not tensor.is_floating_point():
                raise ValueError(f"{key!r} is {tensor.dtype}, and a parameter of an adapter is floating point")
            layers.setdefault(found["path"], {})[found["name"]] = tensor
        elif "glora_" in key:
            raise ValueError(f"{key!r} is no parameter of GLoRA that is known; it comes from another version")
        else:
            rest[key] = tensor
    if all(name.endswith("zeros") for stored in layers.values() for name in stored):
        raise ValueError("this checkpoint has no parameter of GLoRA that is not fixed at zero")
    return dict(sorted(layers.items())), rest


def _joined(layers: Layers, place: str) -> dict[str, Tensor]:
    return {f"{path}.{place}{name}": tensor for path, stored in layers.items() for name, tensor in stored.items()}


def _our_tensors(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's parameters under our names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        letter, _, kind = name.partition(".")
        if kind == "zeros" and bool(tensor.any()):
            raise ValueError(f"glora_{name} must be zeros")
        if kind == "X" and tensor.ndim != 1 and tensor.shape[1:] != (1,):
            raise ValueError(f"glora_{name} must have shape (N, 1) or (N,), the checkpoint has {tuple(tensor.shape)}")
        if kind != "zeros":
            ours[letter + _PARTS[kind]] = tensor.reshape(-1) if kind == "X" else tensor
    return ours


def _their_tensors(config: GLoRAConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's parameters under PEFT's names, and zeros for absent supports where their size is known."""
    names = {f"{letter}{ending}": f"{letter}.{kind}" for letter in SUPPORTS for kind, ending in _PARTS.items()}
    columns = {letter for letter in "ABC" if getattr(config, letter) == "vector"}
    theirs = {names[name]: tensor[:, None] if name in columns else tensor for name, tensor in ours.items()}
    n, k = _sizes(config, ours)
    sizes = {"A": (n, k), "B": (n, k), "C": (k, 1), "D": (n,), "E": (n,)}
    some = next(iter(ours.values()))
    for letter, size in sizes.items():
        if getattr(config, letter) == "none" and None not in size:
            theirs[f"{letter}.zeros"] = some.new_zeros(size)  # type: ignore[arg-type]
    return theirs


def _sizes(config: GLoRAConfig, ours: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """(N, K) of a layer, read from its parameters; None for a size that no parameter has."""
    shapes = config.parameter_shapes(_K, _N)
    found = {size: t.shape[i] for name, t in ours.items() for i, size in enumerate(shapes.get(name, ())) if i < t.ndim}
    return found.get(_N), found.get(_K)


def _check_shapes(config: GLoRAPeftConfig, layers: Layers) -> None:
    """Raise a ValueError where the parameters of a layer do not fit the configuration."""
    configs = config.layer_configs([_module(path) for path in layers])
    for path, stored in layers.items():
        layer = configs[_module(path)]
        for name, tensor in stored.items():
            if tensor.ndim != (dimensions := 2 if "_" in name else 1):
                shape = tuple(tensor.shape)
                raise ValueError(f"{path}: {name} must have {dimensions} dimensions, got shape {shape}")
        n, k = _sizes(layer, stored)
        shapes = layer.parameter_shapes(k or 1, n or 1, "D" in stored)
        given = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if given != shapes:
            raise ValueError(f"{path}: the configuration asks for {shapes}, the checkpoint has {given}")


def _module(path: str) -> str:
    """The path in the base model of a module, from its path in a checkpoint."""
    return path.removeprefix("base_model.model.")


def _plain(config: GLoRAPeftConfig) -> dict[str, Any]:
    """A configuration as JSON values, in the form that PEFT saves."""
    values = config.to_dict() | {"format": FORMAT}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
