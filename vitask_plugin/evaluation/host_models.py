"""The model that asks a checkpoint, by the host that the checkpoint's files name."""

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.asked_model import AskedModel
from vitask_plugin.record.host import host_of


def model_of(folder: str) -> AskedModel:
    """Before anything is loaded.

    Raises:
        VITaskError: the files are of no host.
    """
    host = host_of(folder)
    if host == "llava":
        from vitask_plugin.evaluation.llava_model import LlavaModel as Model
    elif host == "hf":
        from vitask_plugin.evaluation.hf_model import HFModel as Model
    else:
        raise VITaskError(
            f"{folder!r} is no checkpoint of LLaVA 1.5 and no vision-language model in HF format, by its config.json; "
            "give the output folder of a training run"
        )
    model = Model()
    model.prepare()
    return model
