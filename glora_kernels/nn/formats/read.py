"""Reading adapter files of other tools: the same numbers under our names, checked against the model.

Where a tool multiplies both products by one s, so do we (`alpha_A`): a scale folded into a factor would give the same
layer, but Adam normalises gradients, and its steps on s·a would be s times too small or too large for those on a.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn.file import Adapter, Foreign, LayerEntry
from glora_kernels.nn.formats.layouts import ALPHA, EARLIER, ENDINGS, LAYOUTS, LYCORIS, REFUSED, Layout
from glora_kernels.nn.formats.places import Places, Prefix, check_prefix
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import join
from glora_kernels.nn.targets import Linear
from glora_kernels.spec import SUPPORTS, GLoRAConfig

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of an adapter's parameters."""

Stored = dict[str, dict[str, Tensor]]
"""The tensors of a file by the name of a layer, then by ending."""


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is another tool's adapter, also one that cannot be represented."""
    known = {ending for layout in LAYOUTS for ending in layout.endings.values()} | REFUSED.keys() - {"weight", "scalar"}
    return any((found := _split(key)) is not None and found[1] in known for key in keys)


def adapter_of(found: Foreign, root: nn.Module, prefix: Prefix, rs_lora: bool | None) -> Adapter:
    """The adapter of a file for an unwrapped model, under the paths of its layers.

    Args:
        found: the file.
        root: the unwrapped model, plain or with GLoRA layers.
        prefix: of the names, as users give it.
        rs_lora: whether s = alpha/√R; None where the user has not said it.

    Raises:
        ValueError: a key, a shape, a dtype or a value that is no adapter of this model's layers, by name.
    """
    check_prefix(prefix)
    about = found.about
    is_pefts = any(key.startswith("base_model.model.") for key in found.tensors)
    if is_pefts and (prefix is None or found.path.with_name("adapter_config.json").exists()):
        raise ValueError(
            "it is a checkpoint of PEFT, whose scale alpha/r is in adapter_config.json and not in the file: "
            "peft.PeftModel.from_pretrained(model, folder) loads it, and gk.accelerate(model) computes it here"
        )
    stored = _by_name(found.tensors)
    places = Places(root, stored, prefix)
    here = {name: linear for name in stored if (linear := places.find(name)) is not None}
    if not here:
        raise ValueError(f"it has nothing for this model: no name begins with prefix={prefix!r}")
    layouts = {name: _layouts(name, stored[name]) for name in here}
    fitting = {name: _fitting(name, stored[name], layouts[name], here[name]) for name in here}
    earlier = any(found == [EARLIER] for found in fitting.values())
    asked = any(
        (LYCORIS in found or name.startswith("lycoris_"))
        and ALPHA in stored[name]
        and _rank(stored[name], found[0]) > 1
        for name, found in fitting.items()
    )
    by_root = _rs_lora(rs_lora, about, asked)
    entries: dict[str, LayerEntry] = {}
    values: dict[str, Tensor] = {}
    for name, linear in here.items():
        layout = EARLIER if earlier and EARLIER in fitting[name] else fitting[name][0]
        rank = _rank(stored[name], layout)
        alpha = _alpha(name, stored[name], about, rank, by_root)
        if linear.path in entries:
            raise ValueError(f"{name!r} is {linear.path!r} in this model, which another name of the file means too")
        n, k = linear.base.shape
        has_bias = (linear.module.base_bias if isinstance(linear.module, GLoRALinear) else linear.base.bias) is not None
        entries[linear.path] = LayerEntry(layout.config(rank, alpha), k, n, has_bias, False, kernel=linear.base.kernel)
        values |= {join(linear.path, own): stored[name][ending].flatten(1) for own, ending in layout.endings.items()}
    return Adapter(entries, [], {}, values)


def as_in(config: GLoRAConfig, own: GLoRAConfig) -> GLoRAConfig:
    """The model's configuration `own` where it says the same as that of a file, which knows less; else the file's.

    A file has neither dropout nor init, and its scales in fp32: s = 1 is alpha=None or alpha=rank.
    """
    forms = (*SUPPORTS, "rank", *(["variant"] if config.A == "lora" else []))
    same = all(getattr(config, name) == getattr(own, name) for name in forms)
    scales = (config.scale, own.scale), (config.scale_A, own.scale_A)
    return own if same and all(math.isclose(*pair, rel_tol=1e-6) for pair in scales) else config


def _split(key: str) -> tuple[str, str] | None:
    """(name, ending) of a key; None for an unknown ending."""
    return next(((key[: -len(end) - 1], end) for end in ENDINGS if key.endswith(f".{end}")), None)


def _by_name(tensors: Mapping[str, Tensor]) -> Stored:
    stored: Stored = {}
    for key, tensor in tensors.items():
        if (found := _split(key)) is None:
            raise ValueError(f"the key {key!r} is none of an adapter: known endings are {', '.join(sorted(ENDINGS))}")
        name, ending = found
        stored.setdefault(name, {})[ending] = tensor
    return stored


def _layouts(name: str, stored: Mapping[str, Tensor]) -> list[Layout]:
    """The layouts that have exactly the endings of a layer."""
    if refused := [ending for ending in stored if ending in REFUSED]:
        raise ValueError(
            f"{name!r} has {refused[0]!r}, {REFUSED[refused[0]]}, which no adapter of this library can represent; "
            f"accepted are {', '.join(layout.title for layout in LAYOUTS)}"
        )
    given = stored.keys() - {ALPHA}
    if not given:
        raise ValueError(f"{name!r} has {ALPHA!r} alone; the file is only a part")
    found = [layout for layout in LAYOUTS if given == set(layout.endings.values())]
    if not found:
        near = next((one for one in LAYOUTS if given < set(one.endings.values())), None)
        if near is None:
            raise ValueError(f"{name!r} mixes layouts: it has {', '.join(sorted(given))}")
        lacking = ", ".join(sorted(set(near.endings.values()) - given))
        raise ValueError(f"{name!r} has {', '.join(sorted(given))} but not {lacking}; the file is only a part")
    return found


def _fitting(name: str, stored: Mapping[str, Tensor], layouts: list[Layout], linear: Linear) -> list[Layout]:
    """Those of the layouts whose shapes fit the layer, after checking dtypes and values."""
    for ending, tensor in stored.items():
        if tensor.dtype not in FLOATS and (ending != ALPHA or tensor.is_complex()):  # LyCORIS writes alpha=2 as int64
            raise ValueError(f"{name!r} has {ending!r} in {tensor.dtype}; accepted are {', '.join(map(str, FLOATS))}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} has NaN or inf in {ending!r}")
    (n, k), kernel = linear.base.shape, linear.base.kernel
    given = {ending: tuple(tensor.shape) for ending, tensor in stored.items() if ending != ALPHA}
    # Of a 1 x 1 convolution some tools write matrices.
    kernels = [kernel, ()] if set(kernel) == {1} else [kernel]
    fitting = [
        layout for layout in layouts if given in [layout.shapes(_rank(stored, layout), k, n, own) for own in kernels]
    ]
    if fitting:
        return fitting
    wanted = layouts[0].shapes(_rank(stored, layouts[0]), k, n, kernel)
    ending = next(ending for ending in wanted if given[ending] != wanted[ending])
    raise ValueError(
        f"{name!r} has {ending!r} of shape {given[ending]}, where {linear.path!r} of this model, which is "
        f"{(n, k, *kernel)}, takes {wanted[ending]}"
    )


def _rank(stored: Mapping[str, Tensor], layout: Layout) -> int:
    """R: the rows of B_down."""
    down = stored[layout.endings["B_down"]]
    return max(down.shape[0], 1) if down.ndim else 1


def _alpha(name: str, stored: Mapping[str, Tensor], about: Mapping[str, str], rank: int, by_root: bool) -> float | None:
    """The alpha of a layer, from its own tensor or the metadata that diffusers writes; None: s = 1.

    by_root: the tensor means s = alpha/√R.
    """
    if (tensor := stored.get(ALPHA)) is None:
        return _alpha_of_diffusers(name, about, rank)
    if tensor.numel() != 1:
        raise ValueError(f"{name!r} has {ALPHA!r} of shape {tuple(tensor.shape)}, and it is one number")
    if (alpha := float(tensor)) == 0.0:
        raise ValueError(f"{name!r} has {ALPHA} = 0, with which its adapter would have no effect and never be trained")
    return alpha * math.sqrt(rank) if by_root else alpha


def _alpha_of_diffusers(name: str, about: Mapping[str, str], rank: int) -> float | None:
    """alpha by a LoraConfig in the metadata, whose fields diffusers prefixes with the name of the part."""
    fields = _object(about.get("lora_adapter_metadata"))
    own = {key.rpartition(".")[2]: value for key, value in fields.items() if name.startswith(key.rpartition(".")[0])}
    for field in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias"):
        if own.get(field):
            raise ValueError(
                f"its metadata has {field}={own[field]!r}, which is not read; load it by diffusers or PEFT"
            )
    alpha = own.get("lora_alpha")
    if alpha is None:
        return None
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"its metadata has lora_alpha={alpha!r}, which is no finite number other than 0")
    return float(alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1.0)


def _rs_lora(given: bool | None, about: Mapping[str, str], asked: bool) -> bool:
    """Whether s = alpha/√R. `asked`: the file may come from a training with rs_lora."""
    if given not in (None, True, False):
        raise TypeError(f"rs_lora must be None, True or False, got {given!r}")
    arguments = _object(about.get("ss_network_args"))
    said = str(arguments.get("rs_lora", False)).lower() in ("true", "1", "yes") if "ss_network_args" in about else None
    if given is not None and said is not None and given != said:
        raise ValueError(f"its metadata (ss_network_args) says rs_lora={said}, and rs_lora={given} was given")
    known = given if said is None else said
    if known is None and asked:
        raise ValueError(
            "it does not say whether LyCORIS trained it with rs_lora (s = alpha/sqrt(rank) in place of alpha/rank): "
            "give rs_lora=False, LyCORIS's default and how ComfyUI reads every file, or rs_lora=True"
        )
    return bool(known)


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object in the metadata; empty where there is none."""
    try:
        found = json.loads(text or "{}")
    except (RecursionError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"its metadata is no JSON object where one is expected: {text!r:.60}")
    return found
