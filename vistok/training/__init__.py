"""Training: recipes, the loop, checkpoints that resume to the bit."""
