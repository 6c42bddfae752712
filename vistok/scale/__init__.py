"""Whole datasets through a tokenizer: source -> tokens -> store, exactly once."""
