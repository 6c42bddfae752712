"""Measures of reconstruction, generation and compression."""
