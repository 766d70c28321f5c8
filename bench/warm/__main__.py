import sys

from .archive import main

if __name__ == "__main__":
    sys.exit(main())
