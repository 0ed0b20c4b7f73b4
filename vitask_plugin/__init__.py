"""VITask: task-specific visual instruction tuning for LLaVA and lmms-eval (arXiv 2410.06456)."""

__version__ = "0.1.0"
