"""A real Prometheus scrapes a running server: the dashboard's queries return data, and promtool accepts the scrape."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
import yaml
from publisher import Publisher, free_port
from test_alerts import FILES, queries, rules

from kvindex_server.config import Settings
from kvindex_server.metrics import REPLICAS, SPANS, STORE
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.server import Server

TOKEN = "an-operators-token-of-this-test-0123456789"
METRICS_PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with something to show in every metric."""
    home = tmp_path_factory.mktemp("server")
    path, operators = home / "pods.yaml", home / "operators"
    operators.write_text(f"{TOKEN}\n", encoding="utf-8")
    with Publisher() as engine:
        engine.publish(msgpack.packb([time.time(), [["BlockStored", [1], None, [7] * 4, 4, None, "GPU"]], 0]))
        engine.publish(msgpack.packb([time.time(), [["BlockMoved", [1]], ["BlockRemoved", [9], "GPU"]], 0]))
        pod = {"pod": "a", "model": "m", "endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint}
        twice = {**pod, "pod": "b", "endpoint": pod["endpoint"].replace("127.0.0.1", "localhost")}
        path.write_text(json.dumps([pod, twice]), encoding="utf-8")
        document = {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "limits": {"max_registered_pods": 1},
            "discovery": {"file": {"path": str(path), "interval_seconds": 0.05}},
            "auth": {"admin_tokens_file": str(operators)},
            "server": {"drain_seconds": 0},
        }
        made = Server(Settings.model_validate(document))
        made.start()
        assert made.wait_ready(10)
        path.unlink()  # a failure of the source
        yield made
        made.stop()


@pytest.fixture(scope="module")
def prometheus(promtool: str, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a Prometheus that has scraped the server a few times under load."""
    binary = shutil.which("prometheus") or str(Path(promtool).parent / "prometheus")
    home = tmp_path_factory.mktemp("prometheus")
    job = {"job_name": "kvindex", "static_configs": [{"targets": [server.metrics_address]}]}
    every = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "500ms")
    config = {"global": every, "rule_files": [str(FILES / "alerts.yaml")], "scrape_configs": [job]}
    (home / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={home}/prometheus.yaml", f"--storage.tsdb.path={home}/data"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([binary, *flags, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with grpc.insecure_channel(server.grpc_address) as channel:
            stub = rpc.KVIndexStub(channel)
            ends = time.monotonic() + 40
            while _scrapes(f"http://{address}") < 4:
                assert process.poll() is None, (home / "log").read_text()
                assert time.monotonic() < ends, "Prometheus did not scrape in time"
                stub.Score(pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[7] * 4)))
                with pytest.raises(grpc.RpcError):  # a call turned away
                    rpc.KVIndexAdminStub(channel).GetStats(pb.GetStatsRequest(), timeout=5)
                for found in (4, 0, 8):  # as foreseen, less, more
                    stub.ReportUsage(pb.ReportUsageRequest(model="m", pod="a", predicted_tokens=4, cached_tokens=found))
                time.sleep(0.2)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def _query(base: str, expression: str) -> list[Any]:
    url = f"{base}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return list(json.load(answer)["data"]["result"])


def _scrapes(base: str) -> float:
    try:
        result = _query(base, "count_over_time(kvindex_ready[1h])")
    except OSError:  # not up yet
        return 0
    return float(result[0]["value"][1]) if result else 0


def test_the_dashboards_queries_return_data(prometheus: str) -> None:
    """Every panel shows something for a server that has seen everything once."""
    empty = [each for each in queries() if not _query(prometheus, each.replace("$model", ".*"))]
    assert empty == []


def test_the_alerts_are_evaluated_over_a_live_scrape(prometheus: str) -> None:
    """None fails over real labels, and a pod that the server cannot follow is about to be told of."""
    ends = time.monotonic() + 20
    found: dict[str, dict[str, Any]] = {}
    while not found or "unknown" in {each["health"] for each in found.values()}:
        assert time.monotonic() < ends, found
        with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=5) as answer:
            (group,) = json.load(answer)["data"]["groups"]
        found = {each["name"]: each for each in group["rules"]}
        time.sleep(0.2)
    assert set(found) == {rule["alert"] for rule in rules()}
    assert {name: each.get("lastError") for name, each in found.items() if each["health"] != "ok"} == {}
    assert found["KVIndexPodsNotFollowed"]["state"] == "pending"
    assert found["KVIndexNotReady"]["state"] == "inactive"


def test_a_running_server_exposes_what_is_documented(server: Server) -> None:
    """Every metric of the documented table and no other, but for what needs peers, a shared store or a collector."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
        exposed = set(re.findall(r"^# TYPE (kvindex_\w+) ", answer.read().decode(), re.MULTILINE))
    elsewhere = {row.name for row in (*REPLICAS, *STORE, *SPANS)}
    documented = set(re.findall(r"^\| `(kvindex_\w+)` \|", METRICS_PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert elsewhere < documented
    assert exposed == documented - elsewhere


def test_promtool_accepts_a_live_scrape(promtool: str, server: Server) -> None:
    """`promtool check metrics`: names, units and help texts as Prometheus wants them."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
        scrape = answer.read()
    done = subprocess.run([promtool, "check", "metrics"], input=scrape, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
