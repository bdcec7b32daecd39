"""The chart's alerts and dashboard: promtool runs their unit tests, and every query names what the server exposes."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvindex_server.metrics import DISCOVERY, REPLICAS, REQUESTS, SNAPSHOTS, STORE, STREAMS, MetricName

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "deploy" / "helm" / "kvindex-server" / "files"
UNIT_TESTS = ROOT / "tests" / "alerts_test.yaml"
DECLARED: dict[str, MetricName] = {
    row.name: row for row in (*REQUESTS, *STREAMS, *STORE, *DISCOVERY, *SNAPSHOTS, *REPLICAS)
}
_SERIES = re.compile(r"\b((?:kvindex|process)_[a-z_]+)(?:\{([^}]*)\})?")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FILES / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def queries() -> list[str]:
    panels = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def check_names(expression: str) -> None:
    """Every series exists, and every label in it or grouped by is one that it has."""
    grouped = {
        label.strip()
        for labels in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", expression)
        for label in labels.split(",")
    }
    known = {"le", "instance", "job"}
    named = _SERIES.findall(expression)
    assert named, expression
    for name, matchers in named:
        if name.startswith("process_"):
            continue
        base = name if name in DECLARED else re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in DECLARED, name
        assert base == name or DECLARED[base].kind == "histogram", name
        known |= set(DECLARED[base].labels)
        for label in re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers):
            assert label in DECLARED[base].labels, f"{name} has no label {label}"
        if DECLARED[base].kind == "counter":
            assert re.search(rf"\b(rate|increase)\({name}\b", expression), f"{name} only grows: use rate or increase"
    assert grouped <= known, expression


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_name_what_exists(rule: dict[str, Any]) -> None:
    check_names(rule["expr"])
    shown = set(re.findall(r"\$labels\.([a-z_]+)", json.dumps(rule["annotations"])))
    for label in shown:
        assert re.search(rf"by \([^)]*\b{label}\b", rule["expr"]), f"{label} is not in the result"


@pytest.mark.parametrize("expression", queries())
def test_the_dashboard_names_what_exists(expression: str) -> None:
    check_names(expression)


def test_the_dashboard_is_whole() -> None:
    """Panels do not overlap, have different ids, and ask the chosen data source."""
    panels = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


def test_every_alert_has_a_unit_test() -> None:
    """Each one fires in some test and stays silent in another."""
    tests = [
        each
        for test in yaml.safe_load(UNIT_TESTS.read_text(encoding="utf-8"))["tests"]
        for each in test["alert_rule_test"]
    ]
    for rule in rules():
        cases = [bool(each["exp_alerts"]) for each in tests if each["alertname"] == rule["alert"]]
        assert set(cases) == {True, False}, rule["alert"]


def test_promtool_accepts_and_runs_them(promtool: str, tmp_path: Path) -> None:
    """`promtool check rules` and `promtool test rules`; the dashboard's queries parse as well."""
    shutil.copy(FILES / "alerts.yaml", tmp_path)
    shutil.copy(UNIT_TESTS, tmp_path)
    recorded = [
        {"record": f"panel_{number}", "expr": expression.replace("$model", ".*")}
        for number, expression in enumerate(queries())
    ]
    (tmp_path / "dashboard.yaml").write_text(yaml.safe_dump({"groups": [{"name": "d", "rules": recorded}]}))
    for arguments in (("check", "rules", "alerts.yaml", "dashboard.yaml"), ("test", "rules", UNIT_TESTS.name)):
        done = subprocess.run(
            [promtool, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
