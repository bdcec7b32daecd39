"""A pytest plugin: the native core from the file that the environment variable CORE names, not the installed one."""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("kvindex_server._core", os.environ["CORE"])
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["kvindex_server._core"] = _module
_spec.loader.exec_module(_module)


def pytest_report_header() -> str:
    """Which core is tested."""
    import kvindex_server._core

    assert kvindex_server._core is _module
    return f"core: {_module.__file__}"
