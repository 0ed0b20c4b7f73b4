"""The lmms-eval model `vitask_llava`: a LLaVA or VITask checkpoint on any device, batched, with exemplars or without.

lmms-eval --model vitask_llava --model_args pretrained=CKPT[,model_base=BASE][,tsm=DIR][,ep=True|False|all] ...
"""

from vitask_plugin.evaluation.llava_model import LlavaModel
from vitask_plugin.evaluation.lmms_base import VITaskModel


class VITaskLlava(LlavaModel, VITaskModel):
    """See the module; for its arguments `VITaskModel`, and those of its own `LlavaModel`."""

    NAME, OWN = "vitask_llava", ("contrast", "conv_template")
