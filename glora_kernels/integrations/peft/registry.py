"""Registering a method that is not PEFT's own with PEFT.

`peft.utils.register_peft_method` needs a member of `PeftType` with its name; an Enum has no public way to add members.
"""

from __future__ import annotations

from typing import Any


def peft_type(name: str) -> Any:
    """The member of `PeftType` of this name, which is added if missing.

    It works like the others: `PeftType(name)`, `PeftType.NAME`, iteration, comparison with the str, pickling.
    """
    from peft.utils.peft_types import PeftType

    kind: Any = PeftType
    if name in kind.__members__:
        return kind[name]
    member = str.__new__(kind, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(kind.__members__)
    member.__objclass__ = kind
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member
    if hasattr(kind, "_hashable_values_"):  # used by `in` from Python 3.13 on
        kind._hashable_values_.append(name)
    type.__setattr__(kind, name, member)
    return member


def register(name: str, config: type, model: type) -> None:
    """Register a method with PEFT under its name in lower case; registering it again is harmless.

    Raises:
        KeyError: another method has this name.
    """
    from peft import mapping
    from peft.utils import register_peft_method

    member = peft_type(name.upper())
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and known.__module__ == config.__module__:
        # Our module was imported again, and has new classes.
        del mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member]
        del mapping.PEFT_TYPE_TO_TUNER_MAPPING[member]
        del mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member]
    register_peft_method(name=name, config_cls=config, model_cls=model)
