"""Blocks and trunks: plain modules that know nothing of tokens."""
