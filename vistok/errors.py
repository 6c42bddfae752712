"""Errors that a user can mend. Each says what was wrong, what was expected and what to do."""


class VistokError(Exception):
    """Base of every error that vistok raises on purpose; the command line prints it as one line."""


class InputError(VistokError, ValueError):
    """Pixels, tokens or an argument have a wrong shape, range, size or value."""


class FormatError(VistokError, ValueError):
    """A file is damaged, of another kind, or written by a newer version."""


class MismatchError(VistokError, ValueError):
    """Tokens, a store or a checkpoint belong to another model than the one at hand."""


class UnknownNameError(VistokError, LookupError):
    """A model, system, recipe or option that does not exist; the message names the nearest ones."""

    def __str__(self) -> str:  # LookupError would quote it
        return str(self.args[0]) if self.args else ""


class MissingExtraError(VistokError, ImportError):
    """A feature needs a package that is not installed; the message names the extra."""


class ConfigError(VistokError, ValueError):
    """A recipe or a model configuration holds an unknown key or an impossible value."""


class OutputError(VistokError, OSError):
    """Something could not be written: it exists, the folder is read-only, the disk is full."""


def nearest(name: str, known: "list[str] | tuple[str, ...]", limit: int = 3) -> str:
    """A clause that names the known words closest to `name`, for error messages; empty if none is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(word) for word in close)}?" if close else ""
