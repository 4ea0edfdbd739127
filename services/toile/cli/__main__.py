"""`python -m toile.cli`."""

from toile.cli.main import main

if __name__ == "__main__":
    main()
