"""The entry point `lmms_eval.models`: tells lmms-eval where our models are. Imports nothing heavy."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = (
    ModelManifest(
        model_id="vitask_llava",
        simple_class_path="vitask_plugin.evaluation.lmms_llava.VITaskLlava",
    ),
    ModelManifest(
        model_id="vitask_hf",
        simple_class_path="vitask_plugin.evaluation.lmms_hf.VITaskHF",
    ),
)
