"""The version of this package; alone in a file, so that every room can write it into what it saves."""

__version__ = "0.1.0"
