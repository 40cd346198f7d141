"""Configuration: its keys, and the files and overrides that set them."""

from sslr1.config.file import IMMATERIAL, check, check_unchanged, dump, load, of_run
from sslr1.config.kinds import BUILTIN_IMAGES, BUILTIN_MODELS, ConfigError, nearest
from sslr1.config.settings import Config, levels, shares

__all__ = [
    "BUILTIN_IMAGES",
    "BUILTIN_MODELS",
    "IMMATERIAL",
    "Config",
    "ConfigError",
    "check",
    "check_unchanged",
    "dump",
    "levels",
    "load",
    "nearest",
    "of_run",
    "shares",
]
