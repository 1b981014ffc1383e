"""A 4-bit weight in a state dict, under the names that bitsandbytes and transformers use.

<name>                                    packed codes, uint8 (P, 1)
<name>.absmax                             fp32, or uint8 where nested
<name>.quant_map                          fp32 (16,)
<name>.nested_absmax, .nested_quant_map   fp32, where nested
<name>.quant_state.bitsandbytes__nf4      uint8 (256,): the other values as JSON, padded with blanks; any length is read
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from glora_kernels.modes import has_values
from glora_kernels.quant.codes import QUANT_TYPES, codebook, dynamic_map
from glora_kernels.quant.weight import DTYPES, NestedState, QuantState

_JSON = "quant_state.bitsandbytes__"
_JSON_BYTES = 256  # enough for any state; the fixed length lets a checkpoint load in place
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
NAMES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_JSON + name for name in QUANT_TYPES))
"""Every suffix that can follow the name of the weight."""


def state_tensors(state: QuantState) -> dict[str, Tensor]:
    """The metadata of packed codes as tensors, by the suffixes above; no two of them share memory."""
    values: dict[str, object] = {
        "quant_type": state.quant_type, "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."), "shape": list(state.shape),
    }  # fmt: skip
    known, device = all(map(has_values, state.tensors())), state.absmax.device
    tensors = {"absmax": state.absmax, "quant_map": codebook(state.quant_type, device).clone()}
    if state.nested is not None:
        tensors |= {"nested_absmax": state.nested.absmax, "nested_quant_map": state.nested.code.clone()}
        values |= {
            "nested_blocksize": state.nested.blocksize, "nested_dtype": "float32",
            "nested_offset": float(state.nested.offset) if known else None,
        }  # fmt: skip
    if known:
        text = json.dumps(values).ljust(_JSON_BYTES).encode()
        entry = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    else:
        entry = torch.empty(_JSON_BYTES, dtype=torch.uint8, device=device)
    return tensors | {_JSON + state.quant_type: entry}


def state_from_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> QuantState:
    """Rebuild a state from the result of `state_tensors`, with its tensors on `device`.

    Raises:
        ValueError: something is missing, damaged or of another format.
        TypeError: a value of the wrong kind.
    """
    found = [name for name in tensors if name.startswith(_JSON)]
    if len(found) != 1:
        raise ValueError(f"a 4-bit weight needs one entry {_JSON}nf4 or {_JSON}fp4; got {sorted(tensors)}")
    if not all(map(has_values, tensors.values())):
        raise ValueError("the quantization state is on the meta device and has no values")
    try:
        values = json.loads(bytes(tensors[found[0]].tolist()))
        quant_type, shape, dtype = values["quant_type"], values["shape"], _DTYPES[values["dtype"]]
        blocksize = values["blocksize"]
        sizes = (int(shape[0]), int(shape[1]))
        nested = None
        if "nested_blocksize" in values:
            nested = NestedState(
                tensors["nested_absmax"].to(device), tensors["nested_quant_map"].to(device),
                int(values["nested_blocksize"]),
                torch.tensor(float(values["nested_offset"]), dtype=torch.float32, device=device),
            )  # fmt: skip
        absmax, code = tensors["absmax"].to(device), tensors["quant_map"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"the quantization state is damaged or of another format: {error!r}") from error
    if nested is not None and not torch.equal(nested.code.cpu(), dynamic_map(torch.device("cpu"))):
        raise ValueError("the nested code, nested_quant_map, is not the 8-bit dynamic map")
    if quant_type not in QUANT_TYPES or _JSON + quant_type != found[0] or len(shape) != 2:
        raise ValueError(f"the quantization state says {quant_type!r} of shape {shape}, its name {found[0]!r}")
    numbers = [absmax] if nested is None else [nested.absmax, nested.code, nested.offset]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
        raise ValueError("the quantization state holds NaN or inf")
    if not torch.equal(code.cpu().float(), codebook(quant_type, torch.device("cpu"))):
        raise ValueError(f"quant_map is not the code of {quant_type}")
    return QuantState(absmax, quant_type, blocksize, sizes, dtype, nested)
