"""Entry point of the recipe."""

from toile.training.tiny_base.cli import main

if __name__ == "__main__":
    main()
