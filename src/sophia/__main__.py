"""``python -m sophia`` is the command ``sophia``, for environments whose scripts are not on the path."""

from sophia.lab.cli import main

if __name__ == "__main__":
    main()
