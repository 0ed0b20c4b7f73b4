"""lmms-eval tasks, found with `--include_path "$(vitask tasks-path)"`: one template, one small file per task."""
