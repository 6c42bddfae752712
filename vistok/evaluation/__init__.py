"""Comparing tokenizers: on a data set, with each other, and with image codecs at equal bytes."""
