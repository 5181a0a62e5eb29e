"""``python -m eanet`` is the command ``eanet``."""

import sys

from eanet.cli import main

if __name__ == "__main__":
    sys.exit(main())
