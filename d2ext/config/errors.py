"""What a user can get wrong in a config."""


class ConfigError(ValueError):
    """A config file, key or value is wrong. The message says what to do."""
