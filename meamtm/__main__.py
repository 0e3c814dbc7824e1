"""`python -m meamtm` is the command `meamtm`, wherever that has been installed."""

from meamtm.cli import script

if __name__ == "__main__":
    script()
