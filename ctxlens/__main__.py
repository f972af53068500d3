"""`python -m ctxlens`."""

from ctxlens.cli import main

if __name__ == "__main__":
    main()
