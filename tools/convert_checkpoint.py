#!/usr/bin/env python
"""`d2ext convert`, for those who work in a checkout."""

import sys

from d2ext.tools.convert import run

if __name__ == "__main__":
    sys.exit(run())
