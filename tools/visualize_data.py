#!/usr/bin/env python
"""`d2ext visualize-data`, for those who work in a checkout."""

import sys

from d2ext.tools.visualize_data import run

if __name__ == "__main__":
    sys.exit(run())
