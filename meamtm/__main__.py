"""`python -m meamtm`, which is `meamtm`."""

from meamtm.cli import main

if __name__ == "__main__":
    main()
