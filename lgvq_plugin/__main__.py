"""`python -m lgvq_plugin` is `lgvq`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
