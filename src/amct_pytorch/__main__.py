"""``python -m amct_pytorch`` is the `amct` command."""

from amct_pytorch.cli import main

if __name__ == "__main__":
    main()
