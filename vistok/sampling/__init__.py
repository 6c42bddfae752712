"""Samplers on plain tensors: codes from logits, item-wise noise, masked schedules, flow and diffusion solvers."""
