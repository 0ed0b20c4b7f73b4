"""The second host: VLMs in Hugging Face format, trained by transformers' own Trainer."""
