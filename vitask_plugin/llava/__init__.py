"""VITask inside upstream's LLaVA training script. Besides `evaluation.lmms_model`, what imports `llava` is here."""
