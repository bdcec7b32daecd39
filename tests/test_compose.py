"""The compose file for a laptop: valid, complete, and its services' commands really start and find one another."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from publisher import free_port

from kvindex_server.cli import parser as server_parser
from kvindex_server.commands.main import parser as client_parser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "compose"
FILE = FOLDER / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]
PROGRAM = {"kvindex-server": "kvindex_server.cli", "kvindex": "kvindex_server.commands.main"}


def _mounts(service: str) -> dict[str, Path]:
    """Files of this repository by their path in the container."""
    pairs = [each.split(":") for each in SERVICES[service].get("volumes", [])]
    return {target: (FOLDER / source).resolve() for source, target, *_ in pairs if source.startswith(".")}


def _command(program: str, arguments: list[str]) -> list[str]:
    return [sys.executable, "-c", f"import sys; from {PROGRAM[program]} import main; sys.exit(main())", *arguments]


def test_it_is_a_compose_file() -> None:
    """By the compose specification's own model, names of volumes included."""
    compose_spec = pytest.importorskip("compose_spec")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", FILE.read_text(encoding="utf-8"))
    parsed = compose_spec.PyCompose.from_yaml(text)
    parsed.validate()
    assert set(parsed.service_names()) == {"server", "engines", "prometheus", "grafana"}


def test_what_is_named_exists() -> None:
    """Mounted files, services depended on, and images with a release of their own."""
    for name, service in SERVICES.items():
        assert all(path.is_file() for path in _mounts(name).values()), name
        assert set(service.get("depends_on", [])) <= set(SERVICES)
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"].rpartition("/")[2]
        # Nothing is offered to the neighbours.
        assert all(each.startswith("127.0.0.1:") for each in service.get("ports", []))
    assert SERVICES["engines"]["network_mode"] == "service:server"
    assert SERVICES["engines"]["image"] == SERVICES["server"]["image"]


def test_our_containers_are_restricted() -> None:
    for name in ("server", "engines"):
        assert SERVICES[name]["read_only"] is True
        assert SERVICES[name]["cap_drop"] == ["ALL"]


def test_ports_are_where_commands_listen() -> None:
    """The server's two, as its own command line says, and the target that Prometheus scrapes."""
    args = server_parser().parse_args(SERVICES["server"]["command"])
    inside = {each.rpartition(":")[2] for each in SERVICES["server"]["ports"]}
    assert {args.listen.rpartition(":")[2], args.metrics_listen.rpartition(":")[2]} == inside
    (job,) = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{args.metrics_listen.rpartition(':')[2]}"]}]
    assert job["honor_labels"] is True
    engines = client_parser().parse_args(SERVICES["engines"]["command"])
    assert (engines.command, engines.pods, engines.register) == ("simulate", 2, True)
    assert engines.server.rpartition(":")[2] == args.listen.rpartition(":")[2]


def test_grafana_finds_its_data_and_the_dashboard() -> None:
    """The provisioned source is Prometheus at its own port; the provider's folder has the chart's dashboard."""
    mounts = _mounts("grafana")
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources.yaml").read_text(encoding="utf-8"))["datasources"]
    assert source["url"] == f"http://prometheus:{SERVICES['prometheus']['ports'][0].rpartition(':')[2]}"
    assert source["isDefault"]  # the dashboard's variable takes the default one
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards.yaml").read_text(encoding="utf-8"))["providers"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert json.loads(mounts[home].read_text(encoding="utf-8"))["uid"] == "kvindex-server"


def test_prometheus_accepts_its_configuration(promtool: str, tmp_path: Path) -> None:
    """`promtool check config`, with the alerts where the container has them."""
    mounts = _mounts("prometheus")
    (flag,) = [each for each in SERVICES["prometheus"]["command"] if each.startswith("--config.file=")]
    text = mounts[flag.partition("=")[2]].read_text(encoding="utf-8")
    for inside, outside in mounts.items():
        text = text.replace(inside, str(outside))
    path = tmp_path / "prometheus.yaml"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run([promtool, "check", "config", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout


def _started(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


@pytest.fixture
def grpc_address(tmp_path: Path) -> Iterator[str]:
    """The address of the server and the engines, started by the file's own commands on free ports."""
    ports = {f":{each.rpartition(':')[2]}": f":{free_port()}" for each in SERVICES["server"]["ports"]}

    def moved(arguments: list[str]) -> list[str]:
        for old, new in ports.items():
            arguments = [
                each.replace("0.0.0.0", "127.0.0.1").replace(old, new) if each.endswith(old) else each
                for each in arguments
            ]
        return arguments

    serving = moved(SERVICES["server"]["command"])
    address = serving[serving.index("--listen") + 1]
    processes = [_started(_command("kvindex-server", serving), tmp_path / "server.log")]
    try:
        health = moved(SERVICES["server"]["healthcheck"]["test"])
        assert health[:2] == ["CMD", "kvindex"]
        ends = time.monotonic() + 60
        while subprocess.run(_command("kvindex", health[2:]), capture_output=True, timeout=30, check=False).returncode:
            assert processes[0].poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < ends, "the health check never passed"
        (program,) = SERVICES["engines"]["entrypoint"]
        processes.append(_started(_command(program, moved(SERVICES["engines"]["command"])), tmp_path / "engines.log"))
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            process.wait(timeout=30)


def test_the_commands_work_together(grpc_address: str, tmp_path: Path) -> None:
    """The health check passes once the server answers; the engines register themselves, and are known exactly."""
    listing = _command("kvindex", ["pods", "--json", "--server", grpc_address])
    ends = time.monotonic() + 60
    known: dict[str, str] = {}
    while len(known) < 2 or set(known.values()) != {"TRUST_EXACT"}:
        assert time.monotonic() < ends, (known, (tmp_path / "engines.log").read_text())
        done = subprocess.run(listing, capture_output=True, text=True, timeout=30, check=False)
        streams = json.loads(done.stdout).get("streams", []) if done.returncode == 0 else []
        known = {each["pod"]: each["trust"] for each in streams if int(each.get("blocks", 0)) > 0}
        time.sleep(0.2)
    assert set(known) == {"sim-0", "sim-1"}


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_docker_accepts_it() -> None:
    """`docker compose config`, where there is one."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("this docker has no compose")
    done = subprocess.run(
        ["docker", "compose", "-f", FILE, "config", "--quiet"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
