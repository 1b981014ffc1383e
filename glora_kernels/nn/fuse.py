"""Fusing siblings, layers that read the same input, into one launch: q, k and v; gate and up; K and V across a decoder.

Names, parameters and checkpoints stay as they are; `nn.siblings` describes how fused layers compute.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from glora_kernels.grouped.op import MAX_MEMBERS
from glora_kernels.nn.linear import GLoRALinear, Siblings
from glora_kernels.nn.model import layers_of, unwrap
from glora_kernels.nn.names import sibling_sets
from glora_kernels.nn.patterns import listed, unmatched
from glora_kernels.nn.siblings import install, refusal
from glora_kernels.spec import depthless, select

_QUOTED = re.compile("'([^']*)'")  # a path in a sentence


@dataclass(frozen=True, repr=False)
class FusedReport:
    """The fused groups of a model (paths), and the sets left out with the reason; print it for a summary.

    The summary has one line for all groups that differ only by the block, and likewise for the sets left out.
    """

    groups: tuple[tuple[str, ...], ...]
    left_out: tuple[tuple[tuple[str, ...], str], ...] = ()

    def __repr__(self) -> str:
        count = _counted(len(self.groups), "group")
        lines = [f"{count} of siblings, each one launch forward (two with dropout, a large rank or fp32 factors)"]
        lines += [f"  {count} x  {name}" for name, count in Counter(map(_type, self.groups)).items()]
        alike: dict[str, list[str]] = {}
        for paths, reason in self.left_out:
            of_blocks = _QUOTED.sub(lambda path: f"'{depthless(path[1])}'", reason)
            of_blocks = f"{', '.join(map(depthless, paths))}: {of_blocks}"
            alike.setdefault(of_blocks, []).append(f"{', '.join(paths)}: {reason}")
        for of_blocks, sentences in alike.items():
            more = f"{of_blocks} ({len(sentences)} such sets)"
            lines.append(f"  left out: {more if len(sentences) > 1 else sentences[0]}")
        return "\n".join(lines)


def fuse_siblings(model: nn.Module, groups: Iterable[Iterable[str]] | None = None) -> FusedReport:
    """Compute GLoRA layers that read the same input (q, k and v; gate and up) in one launch, in place.

    From now on the layer of a group that is called first computes the outputs of all, and one backward serves all.
    Outputs and gradients differ only by the rounding of sums; module names, checkpoints and the order in which dropout
    masks are drawn stay the same. Layers need A = none and B = lora or none; C, D and E are free. Where only some of a
    set are adapted, those are fused. Layers that are fused already are left as they are.

    The layers of a group must be called with the same tensor object; a call with another raises an error. All rules:
    `nn.siblings.SiblingGroup`.

    Args:
        model: a model with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        groups: for models with other names: for each group several patterns ("c_q", or a path with wildcards), in the
            order in which the layers are called. The matching layers of one parent become one group. None: the sets
            that `sibling_sets` finds.

    Returns:
        Every fused group of the model, and the sets left out with the reason.

    Raises:
        ValueError: no GLoRA layer, a pattern that matches none, a layer in two groups, or nothing to fuse (the
            message says why). The model is unchanged.
        TypeError: `groups` holds something else than patterns.

    Examples:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        ...     def forward(self, x):
        ...         return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)
        >>> print(gk.fuse_siblings(gk.inject(nn.Sequential(Attention()), gk.GLoRAConfig.lora())))
        1 group of siblings, each one launch forward (two with dropout, a large rank or fp32 factors)
          1 x  #: q_proj, k_proj, v_proj
    """
    layers = layers_of(model, "fuse_siblings")
    sets = sibling_sets(unwrap(model)) if groups is None else _matched(layers, groups)
    return _fuse("fuse_siblings", layers, sets)


def fuse_cross_attention(model: nn.Module, layers: str | Iterable[str] | None = None) -> FusedReport:
    """Compute K and V of every decoder layer on one encoder state in one launch, in place.

    The call of the first decoder layer computes all outputs and keeps them for the later layers: M·ΣN numbers, for L
    layers 2·L·M·N, most of which training keeps in any case. Inside activation checkpoints, and under torch.compile,
    each decoder layer computes its own k and v in one launch. Fused pairs of k and v become part of the larger group; a
    stack with more layers than one launch takes becomes several groups.

    In training with dropout the masks of all these layers are drawn at the first call, before those of the layers in
    between. This changes the order of drawing: with the same seed the masks differ from those without fusion.

    Args:
        model: a model with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        layers: for models with other names: patterns of the layers that read the one encoder state. None: the k and v
            projections of cross-attention, one group for each stack of layers. Blocks that read different states are
            no error (a block may be skipped), but then each block computes the outputs of all.

    Returns:
        Every fused group of the model, and the sets left out with the reason.

    Raises:
        ValueError: no GLoRA layer, a pattern that matches none, or nothing to fuse (the message says why). The model
            is unchanged.
        TypeError: `layers` holds something else than patterns.
    """
    adapted = layers_of(model, "fuse_cross_attention")
    if layers is None:
        stacks: dict[object, list[list[str]]] = {}
        for paths in sibling_sets(unwrap(model), cross_attention_alone=True):
            stacks.setdefault(depthless(paths[0].rpartition(".")[0]), []).append(paths)
        blocks = list(stacks.values())
    else:
        blocks = [_by_parent(_matching("layers", adapted, [layers] if isinstance(layers, str) else layers))]
    sets = [chunk for stack in blocks for chunk in _chunks(adapted, stack)]
    return _fuse("fuse_cross_attention", adapted, sets)


def split_siblings(model: nn.Module) -> None:
    """Undo `fuse_siblings` and `fuse_cross_attention`: every layer computes alone again.

    Layers that share one B_down as siblings (`ShareLoRAConfig(tie_siblings=True)`) keep their common dropout mask.

    Raises:
        ValueError: the model has no GLoRA layer, or none that is fused.
    """
    fused = [group for group in _groups(layers_of(model, "split_siblings")) if group.fused]
    if not fused:
        raise ValueError("split_siblings: no layer of the model is fused")
    for group in fused:
        if group.tied:
            group.fused = False
        else:
            group.dissolve()


def _fuse(caller: str, layers: Mapping[str, GLoRALinear], sets: Sequence[Sequence[str]]) -> FusedReport:
    """Make a group of every set where that is possible; it absorbs existing groups whose members all lie in the set."""
    plan: list[list[str]] = []
    left_out: list[tuple[tuple[str, ...], str]] = []
    for paths in sets:
        adapted = [path for path in paths if path in layers]
        if not adapted or _is_fused(layers, adapted):
            continue
        if reason := _reason(layers, adapted):
            left_out.append((tuple(paths), reason))
        else:
            plan.append(adapted)
    if not plan and not any(group.fused for group in _groups(layers)):
        why = "".join(f"; {', '.join(paths)}: {reason}" for paths, reason in left_out[:4])
        raise ValueError(f"{caller}: no GLoRA layers to fuse{why}. {listed('GLoRA layer', layers)}")
    for adapted in plan:
        for group in _groups({path: layers[path] for path in adapted}):
            group.dissolve()
        install({path: layers[path] for path in adapted})
    return FusedReport(tuple(group.names for group in _groups(layers) if group.fused), tuple(left_out))


def _is_fused(layers: Mapping[str, GLoRALinear], paths: Sequence[str]) -> bool:
    group = layers[paths[0]]._siblings
    return group is not None and group.fused and all(layers[path]._siblings is group for path in paths)


def _reason(layers: Mapping[str, GLoRALinear], paths: Sequence[str]) -> str | None:
    """The reason why the layers cannot become one group, or None."""
    members = {path: layers[path] for path in paths}
    if len(members) == 1:
        return f"only {paths[0]!r} is adapted"
    for group in _groups(members):
        own = [name for name, member in zip(group.names, group.members, strict=True) if member in members.values()]
        if len(own) < len(group.names):
            return f"{own[0]!r} is in a group with other layers"
    return refusal(members)


def _groups(layers: Mapping[str, GLoRALinear]) -> list[Siblings]:
    return list(dict.fromkeys(layer._siblings for layer in layers.values() if layer._siblings is not None))


def _matched(layers: Mapping[str, GLoRALinear], groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """The paths that the patterns of each group match, as one set for each parent."""
    sets = []
    owner: dict[str, int] = {}
    for i, group in enumerate(groups):
        paths = _matching(f"groups[{i}]", layers, group)
        for path in paths:
            if owner.setdefault(path, i) != i:
                raise ValueError(
                    f"groups: {path!r} is in groups[{owner[path]}] and groups[{i}]; a layer is in one group"
                )
        sets += _by_parent(paths)
    return sets


def _matching(argument: str, layers: Mapping[str, GLoRALinear], given: Iterable[str]) -> list[str]:
    """The paths that the patterns match, in the order of the patterns."""
    patterns = [] if isinstance(given, str) else list(given)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} takes patterns (a list of str), got {given!r}")
    found: dict[str, None] = {}
    for pattern in patterns:
        selected = select(pattern, layers.keys())
        if not selected:
            raise unmatched(argument, pattern, "matches no GLoRA layer", "layer", layers)
        found |= dict.fromkeys(path for path in layers if path in selected)
    return list(found)


def _by_parent(paths: Iterable[str]) -> list[list[str]]:
    parents: dict[str, list[str]] = {}
    for path in paths:
        parents.setdefault(path.rpartition(".")[0], []).append(path)
    return list(parents.values())


def _chunks(layers: Mapping[str, GLoRALinear], stack: Iterable[Sequence[str]]) -> list[list[str]]:
    """The adapted layers of a stack, split between blocks into lists that are small enough for one launch."""
    chunks: list[list[str]] = []
    for block in stack:
        adapted = [path for path in block if path in layers]
        if not chunks or len(chunks[-1]) + len(adapted) > MAX_MEMBERS:
            chunks.append([])
        chunks[-1] += adapted
    return [chunk for chunk in chunks if chunk]


def _type(paths: Sequence[str]) -> str:
    """A group without its block number, for display: "model.layers.#.self_attn: q_proj, k_proj, v_proj"."""
    parents = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    over = f" of {_counted(len(parents), 'layer')}" if len(parents) > 1 else ""
    return f"{depthless(parents[0])}: {', '.join(names)}{over}".removeprefix(": ")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
