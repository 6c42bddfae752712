"""Programs that use the library as anyone would."""
