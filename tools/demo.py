#!/usr/bin/env python
"""`d2ext predict`, for those who work in a checkout."""

import sys

from d2ext.tools.predict import run

if __name__ == "__main__":
    sys.exit(run())
