"""kvindex-server: which engine pod holds which KV-cache blocks, and how much of a prompt it saves."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvindex-server")
except PackageNotFoundError:  # running from a checkout that was never installed
    __version__ = "0+unknown"
