"""A pytest plugin that keeps PEFT's tests from the model hub at once: they turn the offline mode off, and would wait."""

import huggingface_hub.constants

huggingface_hub.constants.is_offline_mode = lambda: True
