"""The lmms-eval model `vitask_hf`: any VLM in HF format, of VITask or not, batched, with exemplars or without.

    lmms-eval --model vitask_hf --model_args pretrained=DIR[,model_base=BASE][,tsm=DIR][,ep=True|False|all] ...

Without a VITask checkpoint it is free text as stock `generate` gives it, and the exact likelihood of labels.
"""

from vitask_plugin.evaluation.hf_model import HFModel
from vitask_plugin.evaluation.lmms_base import VITaskModel


class VITaskHF(HFModel, VITaskModel):
    """See the module, and for its arguments `VITaskModel`."""

    NAME, OWN = "vitask_hf", ("contrast",)
