"""The host for vision-language models in the format of Hugging Face transformers."""
