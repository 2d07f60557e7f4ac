"""``python -m vit_fast``: the command line."""

from vit_fast.cli import main

if __name__ == "__main__":
    main()
