"""PEFT's registry of methods, and how a method that is not PEFT's own gets into it.

`peft.utils.register_peft_method` takes a method whose name is a member of `PeftType`, an Enum, which is closed.
"""

from __future__ import annotations

from typing import Any


def peft_type(name: str) -> Any:
    """The member of `PeftType` of this name, made where there is none.

    It can do what the others can: `PeftType(name)`, `PeftType.NAME`, iteration, comparison with the str, pickling.
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
    if hasattr(kind, "_hashable_values_"):  # what `in` asks from Python 3.13 on
        kind._hashable_values_.append(name)
    type.__setattr__(kind, name, member)
    return member


def register(name: str, config: type, model: type) -> None:
    """Make a method known to PEFT under its name in lower case; once more is harmless.

    Raises:
        KeyError: another method has this name.
    """
    from peft import mapping
    from peft.utils import register_peft_method

    member = peft_type(name.upper())
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and known.__module__ == config.__module__:
        # This module was imported anew, and has new classes.
        del mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member]
        del mapping.PEFT_TYPE_TO_TUNER_MAPPING[member]
        del mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member]
    register_peft_method(name=name, config_cls=config, model_cls=model)
