"""kvindex-server: which engine pod holds which KV-cache blocks, and how much of a prompt it saves."""

import os
from importlib.metadata import PackageNotFoundError, version

# gRPC reads it when it is imported. It would write lines of its own to stderr, also for every failed handshake of a
# stranger; what matters of them is in our own errors.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

try:
    __version__ = version("kvindex-server")
except PackageNotFoundError:  # running from a checkout that was never installed
    __version__ = "0+unknown"
