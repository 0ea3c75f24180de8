"""``python -m d2ext``: the command line."""

import sys

from d2ext.tools.main import main

if __name__ == "__main__":
    sys.exit(main())
