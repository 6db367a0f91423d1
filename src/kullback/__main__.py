"""`python -m kullback`, the form that `accelerate launch -m` takes."""

from kullback.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
