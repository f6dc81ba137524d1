"""The model: building and loading it, packed attention, losses, LoRA, optimizers."""
