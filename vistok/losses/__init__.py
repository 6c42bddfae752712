"""Losses on plain tensors: adversarial, perceptual, alignment. They know nothing of tokens."""
