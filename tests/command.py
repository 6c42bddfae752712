"""The command line with the tests' own systems: `python -m tests.command train ...`, for tests that need a process."""

from tests import toy  # noqa: F401
from tests.training import pupil  # noqa: F401
from vistok.cli.main import main

if __name__ == "__main__":
    main()
