"""Errors of config files and options."""


class ConfigError(ValueError):
    """A config file, key or value is wrong. The message says what to do."""
