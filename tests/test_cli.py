"""The command line: exit codes, one-line config errors, and what reaches the server."""

import argparse
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvindex_server import __version__, cli, logs
from kvindex_server.config import Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("KVINDEX_")]:
        monkeypatch.delenv(name)
    root, package = logging.getLogger(), logging.getLogger(logs.PACKAGE)
    before = (list(root.handlers), root.level, package.level)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Stands in for the server: keeps the settings it is run with."""
    runs: list[Settings] = []

    def run(settings: Settings, _: logs.Sampler | None, *, as_json: bool) -> int:
        assert not as_json
        runs.append(settings)
        return 7

    install(monkeypatch, "server", run)
    return runs


def install(monkeypatch: pytest.MonkeyPatch, name: str, run: object) -> None:
    module = types.ModuleType(f"kvindex_server.{name}")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"kvindex_server.{name}", module)
    monkeypatch.setattr(f"kvindex_server.{name}", module, raising=False)


def test_serve_without_flags_has_the_defaults(served: list[Settings]) -> None:
    assert cli.main(["serve"]) == 7
    assert served == [Settings()]


def test_serve_flags(served: list[Settings], tmp_path: Path) -> None:
    file = tmp_path / "k.yaml"
    file.write_text("models: [{name: m, block_size: 16}]\nlog: {format: json}\n")
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
    flags += ["--config", str(file), "--tokenizer", f"m={tmp_path}", "--tokenizer", f"org/n={tmp_path}"]
    flags += ["--log-format", "console", "--log-level", "debug"]
    assert cli.main(["serve", *flags]) == 7
    (settings,) = served
    assert settings.listen == settings.metrics_listen == settings.admin_listen == "127.0.0.1:0"
    assert [(model.name, model.block_size, model.tokenizer) for model in settings.models] == [
        ("m", 16, str(tmp_path)),
        ("org/n", 0, str(tmp_path)),
    ]
    assert (settings.log.format, settings.log.level) == ("console", "debug")
    assert logging.getLogger("kvindex_server").level == logging.DEBUG


def test_environment_reaches_the_server(served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVINDEX_LIMITS__MAX_TOKENS", "9")
    cli.main(["serve"])
    assert served[0].limits.max_tokens == 9


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--listen", "nowhere"], "listen: must have the form host:port (from --listen)"),
        (
            ["--log-level", "loud"],
            "log.level: must be 'debug', 'info', 'warning' or 'error' (from --log-level)",
        ),
        (["--tokenizer", "m"], "--tokenizer: must have the form MODEL=DIR"),
        (["--tokenizer", "m=/nowhere"], "models[0].tokenizer: /nowhere is not a directory"),
        (["--tokenizer", "m=/", "--tokenizer", "m=/"], "--tokenizer: model m is given twice"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read: No such file or directory"),
    ],
)
def test_config_error_is_one_line_and_exit_2(
    served: list[Settings], capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    assert cli.main(["serve", *flags]) == 2
    assert capsys.readouterr().err == f"kvindex-server: config: {line}\n"
    assert served == []


def test_demo_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 0

    install(monkeypatch, "demo", run)
    assert cli.main(["demo"]) == 0
    assert (seen[0].pods, seen[0].seconds, seen[0].once) == (4, 0.0, False)
    assert seen[0].rate > 0
    assert cli.main(["demo", "--pods", "2", "--seconds", "1.5", "--rate", "5", "--once"]) == 0
    assert (seen[1].pods, seen[1].seconds, seen[1].rate, seen[1].once) == (2, 1.5, 5.0, True)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["serve", "--liste", "a:1"],
        ["demo", "--pods", "0"],
        ["demo", "--pods", "many"],
        ["demo", "--seconds", "nan"],
        ["demo", "--rate", "0"],
    ],
)
def test_wrong_usage_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: kvindex-server" in capsys.readouterr().err


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvindex_server", "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"kvindex-server {__version__}\n")
    done = subprocess.run(
        [sys.executable, "-m", "kvindex_server", "serve", "--listen", "x"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "kvindex-server: config: listen: must have the form host:port (from --listen)\n"
