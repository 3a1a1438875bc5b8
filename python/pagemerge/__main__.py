"""``python -m pagemerge``: the command ``pagemerge``."""

from pagemerge.cli import main

if __name__ == "__main__":
    main(prog_name="pagemerge")
