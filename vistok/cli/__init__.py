"""The command line: one file per command, each with one function `command`, imported only when the command runs."""
