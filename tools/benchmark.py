#!/usr/bin/env python
"""`d2ext benchmark`, for those who work in a checkout."""

import sys

from d2ext.tools.benchmark import run

if __name__ == "__main__":
    sys.exit(run())
