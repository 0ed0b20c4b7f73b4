"""DeepSpeed: configurations for the Trainer, what a rank needs of memory, and what it sends. `import deepspeed` is the
library."""
