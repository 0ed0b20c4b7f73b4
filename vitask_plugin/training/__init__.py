"""What any host's training needs: transformers' Trainer, DeepSpeed and PEFT, no host."""
