"""What a user of the engine can get wrong."""


class ConfigError(ValueError):
    """A config file, key or value is wrong. The message says what to do."""
