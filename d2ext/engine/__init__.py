"""Training: the Trainer, optimizers and hooks."""
