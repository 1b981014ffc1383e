"""GLoRA and ShareLoRA as methods of PEFT. Importing this registers them, as "GKGLORA" and "GKSHARELORA".

    from glora_kernels.integrations.peft import GLoRAPeftConfig
    model = peft.get_peft_model(model, GLoRAPeftConfig(r=8, target_modules="all-linear"))

They work like any method of PEFT: save_pretrained, PeftModel.from_pretrained, merge_and_unload, add_adapter,
set_adapter, disable_adapter. Import this before loading such an adapter.
"""

from glora_kernels.integrations.release import need_peft

need_peft("glora_kernels.integrations.peft")

from glora_kernels.integrations.peft.config import GLoRAPeftConfig, ShareLoRAPeftConfig  # noqa: E402
from glora_kernels.integrations.peft.convert import convert_checkpoint  # noqa: E402
from glora_kernels.integrations.peft.model import GLoRAPeftModel  # noqa: E402
from glora_kernels.integrations.peft.registry import register  # noqa: E402
from glora_kernels.integrations.peft.share import ShareLoRAPeftModel  # noqa: E402

register("gkglora", GLoRAPeftConfig, GLoRAPeftModel)
register("gksharelora", ShareLoRAPeftConfig, ShareLoRAPeftModel)

__all__ = ["GLoRAPeftConfig", "GLoRAPeftModel", "ShareLoRAPeftConfig", "ShareLoRAPeftModel", "convert_checkpoint"]
