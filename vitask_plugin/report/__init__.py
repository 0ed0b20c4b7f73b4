"""`vitask report`, and what other modules take from it: results read back, and the page of a training run."""

from vitask_plugin.report.page import Confusion, Sample
from vitask_plugin.report.results import TaskResult, on_split, read_results
from vitask_plugin.report.training import loss_curves, write_report

__all__ = ["Confusion", "Sample", "TaskResult", "loss_curves", "on_split", "read_results", "write_report"]
