"""The entry point `lmms_eval.models`: tells lmms-eval where the model `vitask_llava` is. Imports nothing heavy."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="vitask_llava",
    simple_class_path="vitask_plugin.evaluation.lmms_model.VITaskLlava",
)
