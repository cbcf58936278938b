"""`python -m fluxsplit` is the `fluxsplit` command."""

from fluxsplit.cli import main

if __name__ == "__main__":
    main()
