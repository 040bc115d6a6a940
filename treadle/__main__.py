"""Entry point of `treadle` and of `python -m treadle`."""

import sys


def main() -> None:
    """Run the command line; an interrupt during its import ends as quietly as a later one."""
    try:
        from treadle.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
