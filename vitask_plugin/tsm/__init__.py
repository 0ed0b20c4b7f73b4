"""The task-specific model (TSM): a small image classifier that teaches the vision-language model."""
