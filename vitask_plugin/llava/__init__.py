"""VITask inside upstream's LLaVA training script. Besides `evaluation.lmms_llava`, what imports `llava` is here."""
