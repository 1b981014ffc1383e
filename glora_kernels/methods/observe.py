"""What the layers of a model see and do, summed up while it runs: inputs, gradients, hidden states.

with gk.observe(model, "input_norm") as seen:
    train()
seen["layers.0.q_proj"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.methods.factors import LowRank, low_rank
from glora_kernels.nn.model import all_paths, unwrap

KINDS = ("sensitivity", "input_norm", "hidden")


class Seen(Mapping[str, Tensor]):
    """What was observed, by path. `state_dict` and `load_state_dict` carry running means across a restart."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def __getitem__(self, path: str) -> Tensor:
        if path in self._rows:
            return torch.cat(self._rows[path])
        return self._sums[path] / self._counts[path]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._sums, **self._rows})

    def __len__(self) -> int:
        return len(self._sums) + len(self._rows)

    def clear(self) -> None:
        """Begin anew."""
        self._sums.clear()
        self._counts.clear()
        self._rows.clear()

    def add(self, path: str, value: Tensor, count: int = 1) -> None:
        """Count a sum of `count` values in."""
        value = value.detach()
        self._sums[path] = self._sums[path] + value if path in self._sums else value.clone()
        self._counts[path] = self._counts.get(path, 0) + count

    def keep(self, path: str, rows: Tensor) -> None:
        """Keep rows as they are."""
        self._rows.setdefault(path, []).append(rows.detach().to("cpu", torch.float32, copy=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and counts as tensors, by path."""
        counts = {f"count/{path}": torch.tensor(count) for path, count in self._counts.items()}
        return {f"sum/{path}": value for path, value in self._sums.items()} | counts

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.clear()
        for key, value in state.items():
            kind, _, path = key.partition("/")
            if kind == "sum":
                self._sums[path] = value.clone()
            else:
                self._counts[path] = int(value)


@contextlib.contextmanager
def observe(model: nn.Module, kind: str, training: bool = False) -> Iterator[Seen]:
    """Inside, watch the layers of a model.

    | kind          | of                     | what                                                               |
    |---------------|------------------------|--------------------------------------------------------------------|
    | "sensitivity" | every low-rank layer   | the mean over backwards of Σ abs(p·∂p) over its factors, a scalar  |
    | "input_norm"  | every low-rank layer   | the mean over the rows of its inputs of abs(x_k), of shape (K,)    |
    | "hidden"      | every block            | its inputs, and the last one's output ("end"), (rows, K), on the   |
    |               |                        | host in fp32                                                       |

    A block is an entry of the `nn.ModuleList` or `nn.Sequential` with the most linear layers, of one class first. With
    gradient accumulation each backward counts; a gradient scaler's factor is not taken out. A layer's module may be
    compiled, but what is inside torch.compile or a captured graph is not seen: observe the eager model. With
    `training`, "input_norm" takes no call without gradients: validation in the middle of training does not count.

    Raises:
        ValueError: another kind; no low-rank layer, or for "hidden" no blocks.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> with gk.observe(model, "sensitivity") as seen:
        ...     model(torch.randn(2, 16)).square().sum().backward()
        >>> list(seen)
        ['0']
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    seen = Seen()
    with contextlib.ExitStack() as hooks:
        if kind == "hidden":
            found = list(blocks(model).items())
            for path, block in found:
                hooks.callback(block.register_forward_pre_hook(_keeper(seen, path), with_kwargs=True).remove)
            last = found[-1][1].register_forward_hook(lambda module, args, y: seen.keep("end", _rows(_first(y))))
            hooks.callback(last.remove)
        else:
            for path, own in low_rank(model, "observe").items():
                for handle in _watch(seen, path, own, kind, training):
                    hooks.callback(handle.remove)
        yield seen


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model, by path: the entries of the module list that holds the most linear layers.

    Raises:
        ValueError: there is no such list.
    """
    lists = [
        (path, m)
        for path, m in all_paths(unwrap(model))
        if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1
    ]
    if not lists:
        raise ValueError("the model has no blocks: no nn.ModuleList or nn.Sequential with more than one entry")
    path, found = max(lists, key=lambda one: (len({type(m) for m in one[1]}) == 1, _linears(one[1])))
    return {f"{path}.{name}" if path else name: block for name, block in found.named_children()}


def _linears(module: nn.Module) -> int:
    return sum(hasattr(m, "in_features") for m in module.modules())


def _watch(seen: Seen, path: str, own: LowRank, kind: str, training: bool) -> list[Any]:
    if kind == "input_norm":

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if training and not torch.is_grad_enabled():
                return
            rows = _rows(_first((*args, *kwargs.values())))
            seen.add(path, rows.detach().float().abs().sum(0), len(rows))

        return [own.layer.register_forward_pre_hook(look, with_kwargs=True)]
    handles = []
    for i, parameter in enumerate(p for factor in own.factors() if (p := factor.parameter).requires_grad):
        # The first of them counts the backwards.
        def look_at(grad: Tensor, parameter: Tensor = parameter, first: bool = i == 0) -> None:
            seen.add(path, (parameter.detach() * grad).abs().sum().float(), int(first))

        handles.append(parameter.register_hook(look_at))
    return handles


def _keeper(seen: Seen, path: str) -> Any:
    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.keep(path, _rows(_first((*args, *kwargs.values()))))

    return keep


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])
