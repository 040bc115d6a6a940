"""Entry point of `treadle` and of `python -m treadle`."""

from treadle.interrupted_loading import interruptible


def main() -> None:
    """Run the command line. Ctrl-C ends it with exit code 130."""
    from treadle.cli import main as run

    with interruptible():
        run()


if __name__ == "__main__":
    main()
