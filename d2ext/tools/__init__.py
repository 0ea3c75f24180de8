"""The command line: ``d2ext COMMAND`` (see :mod:`d2ext.tools.main`). Nothing imports this package."""
