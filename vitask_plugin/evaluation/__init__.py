"""VITask inside the lmms-eval harness: the model, the label scores, the metrics and the report."""
