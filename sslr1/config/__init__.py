"""Configuration: its keys, and the files and overrides that set them."""

from sslr1.config.file import IMMATERIAL, check, check_unchanged, dump, load, of_run
from sslr1.config.settings import Config, ConfigError

__all__ = ["IMMATERIAL", "Config", "ConfigError", "check", "check_unchanged", "dump", "load", "of_run"]
