"""``python -m mha_fast info | doctor | view``."""

import argparse

from .process.config import show_config
from .process.doctor import doctor
from .viz.view import add_command


def main():
    """Command line of the package."""
    parser = argparse.ArgumentParser(prog="python -m mha_fast")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction sets, threads").set_defaults(
        run=show_config
    )
    commands.add_parser(
        "doctor", help="do NumPy's threads and ours get along here, and what to do"
    ).set_defaults(run=doctor)
    add_command(commands)
    arguments = vars(parser.parse_args())
    del arguments["command"]
    arguments.pop("run")(**arguments)


if __name__ == "__main__":
    main()
