"""Published visual tokenizers, one file per system; the file name is the slug with underscores."""
