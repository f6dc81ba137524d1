"""The verbs that need no Trainer, one file each."""
