"""Entry point of `treadle` and of `python -m treadle`."""

import sys


def main() -> None:
    """Run the command line. Exit with status 130, without a traceback, if an interrupt arrives during the import."""
    try:
        from treadle.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
