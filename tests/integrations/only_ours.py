"""What processes of their own are started with: PEFT's own forward is an error."""

import contextlib
from unittest import mock

import peft


@contextlib.contextmanager
def only_ours():
    """PEFT's own forward raises."""
    raising = mock.Mock(side_effect=AssertionError("PEFT's forward ran"))
    with (
        mock.patch.object(peft.tuners.lora.Linear, "forward", raising),
        mock.patch.object(peft.tuners.glora.layer.GloraLinear, "forward", raising),
    ):
        yield
