"""The entry point, of `treadle` and of `python -m treadle`."""

import sys


def main() -> None:
    """The command line; interrupted while it is still being loaded, it ends as quietly as later on."""
    try:
        from treadle.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
