"""The page over HTTP: what it shows and to whom, its headers, and that it keeps no secret of its own."""

import http.client
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_fleet import BLOCK, HOLED, LATE, LOST, MODEL, PLACED, PROMPT, SPLIT, WHOLE, fleet, serving

from kvindex_server.config import ConfigError, load_settings
from kvindex_server.lookup import Query
from kvindex_server.page.prompt import MAX_PODS, MAX_TEXT_BYTES
from kvindex_server.page.routes import HEADERS
from kvindex_server.pods import PodSpec
from kvindex_server.server import Server

READER = "reader-token-0123456789"


def ask(
    server: Server, path: str, body: object = None, method: str = "", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body); a header's name is written with `_` for `-`."""
    connection = http.client.HTTPConnection(server.metrics_address, timeout=10)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        given.setdefault("Content-Type", "application/json")
    connection.request(method or ("GET" if data is None else "POST"), path, data, given)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def score(server: Server, **body: object) -> tuple[int, Any]:
    status, _, answer = ask(server, "/api/score", {"model": MODEL, "kind": "prompt", "text": PROMPT, **body})
    return status, json.loads(answer)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with fleet(tmp_path_factory.mktemp("page"), page={"prompt": True}) as server:
        yield server


def test_page_and_its_files_with_strict_headers(shown: Server) -> None:
    """Everything the page names comes from this server, under a policy without any exception for inline code."""
    status, headers, body = ask(shown, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    page = body.decode()
    assert "http://" not in page and "https://" not in page
    assert " style=" not in page and "<style" not in page and " on" + "click" not in page
    for name in ("page.css", "page.js", "chart.js", "draw.js", "fleet.js", "prompt.js", "icon.svg"):
        status, headers, body = ask(shown, f"/page/{name}")
        assert status == 200, name
        assert dict(HEADERS).items() <= headers.items()
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert ask(shown, "/page/../routes.py")[0] == 404
    assert ask(shown, "/page/routes.py")[0] == 404
    assert ask(shown, "/", method="HEAD")[2] == b""
    assert ask(shown, "/", {})[0] == 405


def test_fleet_tells_every_stream(shown: Server) -> None:
    status, headers, body = ask(shown, "/api/fleet")
    assert status == 200
    assert dict(HEADERS).items() <= headers.items()
    answer = json.loads(body)
    streams = {each["pod"]: each for each in answer["streams"]}
    assert {pod: each["trust"] for pod, each in streams.items()} == {
        WHOLE: "EXACT",
        SPLIT: "EXACT",
        HOLED: "EXACT",
        PLACED: "COLD",
        LATE: "PARTIAL",
        LOST: "STALE",
    }
    assert answer["streams"][0]["pod"] == LOST  # what is in trouble comes first, should the list be cut
    assert streams[LOST]["cause"] == "gap"
    assert streams[PLACED]["lag_seconds"] is None and streams[PLACED]["age_seconds"] is None
    assert set(streams[SPLIT]["blocks"]) == {"gpu", "cpu", "disk"}
    assert streams[WHOLE]["lag_seconds"] >= 0
    assert answer["prompt"] == "open" and answer["ready"] is True
    assert answer["streams_total"] == 6 and answer["trust"]["EXACT"] == 3
    assert answer["lag"]["count"] >= 6


def test_fleet_tells_nothing_that_metrics_do_not(shown: Server) -> None:
    """The port has no authentication: whatever names a thing in the answer is in a scrape too."""
    metrics = ask(shown, "/metrics")[2].decode()
    for stream in json.loads(ask(shown, "/api/fleet")[2])["streams"]:
        for value in (
            stream["pod"],
            stream["model"],
            stream["cause"],
            stream["trust"],
            stream["state"],
            *stream["blocks"],
        ):
            assert f'"{value}"' in metrics
        assert not {"endpoint", "replay_endpoint", "trust_reason"} & set(stream)


def test_hit_ratio_counts(shown: Server) -> None:
    """The chart's two counters move by what a lookup asked about and found."""

    def counters() -> tuple[int, int]:
        (model,) = json.loads(ask(shown, "/api/fleet")[2])["models"]
        return model["looked_up"], model["matched"]

    before = counters()
    total = score(shown)[1]["total_blocks"]
    assert counters() == (before[0] + total, before[1] + total)  # one pod holds it whole


def test_runs_show_each_block(shown: Server) -> None:
    """Runs add up to the prompt, name the tier of each block, and agree with the score."""
    status, answer = score(shown)
    assert status == 200
    total = answer["total_blocks"]
    assert (answer["block_size"], answer["pods_total"]) == (BLOCK, 6)
    assert total == answer["total_tokens"] // BLOCK
    pods = {each["pod"]: each for each in answer["pods"]}
    for each in pods.values():
        assert sum(count for _, count in each["runs"]) == total
    half, most = total // 2, total * 4 // 5
    assert pods[WHOLE]["runs"] == [["gpu", total]]
    assert pods[SPLIT]["runs"] == [["gpu", half], ["cpu", most - half], ["disk", total - 1 - most], ["", 1]]
    assert pods[SPLIT]["tier_blocks"] == {"gpu": half, "cpu": most - half, "disk": total - 1 - most}
    hole = total // 3
    assert pods[HOLED]["runs"] == [["gpu", hole], ["", 1], ["gpu", total - hole - 1]]
    assert pods[HOLED]["matched_blocks"] == hole
    assert pods[PLACED]["runs"] == [["speculative", total]]
    assert (pods[PLACED]["matched_blocks"], pods[PLACED]["speculative_blocks"]) == (0, total)
    assert [each["pod"] for each in answer["pods"]][:1] == [WHOLE]


def test_each_match_says_why_it_ends(shown: Server) -> None:
    """As Explain does, with the first tokens and keys of the prompt."""
    _, answer = score(shown)
    pods = {each["pod"]: each for each in answer["pods"]}
    total, hole = answer["total_blocks"], answer["total_blocks"] // 3
    assert (pods[WHOLE]["end"], pods[WHOLE]["why"]) == ("WHOLE_PROMPT", f"all {total} blocks are held")
    assert pods[HOLED]["end"] == "REMOVED"
    assert pods[HOLED]["why"].startswith(f"block {hole} was removed from gpu by message 1 (20")
    (left,) = pods[HOLED]["left"]
    told = (left["how"], left["tier"], left["group"], left["sequence"], left["earlier"])
    assert told == ("REMOVED", "gpu", 0, "1", False)
    assert abs(left["time"] - time.time()) < 600
    assert pods[WHOLE]["left"] == pods[SPLIT]["left"] == []
    assert pods[SPLIT]["end"] == "NEVER_STORED" and WHOLE in pods[SPLIT]["why"]
    assert pods[PLACED]["end"] == "NOTHING_HEARD"
    assert {each["end"] for each in answer["pods"] if each["trust"] == "STALE"} == {"ELSEWHERE"}
    assert all("the stream is STALE since 20" in each["why"] for each in answer["pods"] if each["trust"] == "STALE")
    asked = Query(MODEL, "prompt", text=PROMPT)
    prompt = shown._direct._lookup.prompt(asked, lambda: None)
    tokens, keys = memoryview(prompt.tokens).cast("I"), memoryview(prompt.keys).cast("Q")
    assert answer["tokens"] == list(tokens[:64])
    assert answer["keys"] == [f"{key:#018x}" for key in keys[:16]]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": ""}, "text"),
        ({"text": 5}, "text"),
        ({"text": "x" * (MAX_TEXT_BYTES + 1)}, "text"),
        ({"text": "é" * (MAX_TEXT_BYTES // 2 + 1)}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"model": "\ud800"}, "model"),
        ({"lora_name": "\udfff"}, "lora_name"),
        ({"cache_salt": "a\ud800b"}, "cache_salt"),
        ({"kind": "tokens"}, "kind"),
        ({"kind": None}, "kind"),
        ({"model": ""}, None),
        ({"model": "other"}, None),
        ({"kind": "chat"}, "chat"),
        ({"lora": "x"}, "lora"),
    ],
)
def test_a_bad_question_gets_a_typed_error(shown: Server, body: dict[str, object], field: str | None) -> None:
    status, answer = score(shown, **body)
    assert status in (400, 404)
    assert answer["error"]["code"] == ("INVALID_ARGUMENT" if field else "NOT_FOUND")
    assert answer["error"].get("field") == field


def test_other_sites_are_refused(shown: Server) -> None:
    """A script of another origin gets nothing, and no CORS header that would let it read an answer."""
    own = f"http://{shown.metrics_address}"
    body = {"model": MODEL, "kind": "prompt", "text": PROMPT}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ):
        for status, found, answer in (ask(shown, "/api/fleet", **headers), ask(shown, "/api/score", body, **headers)):
            assert status == 403
            assert json.loads(answer)["error"]["code"] == "PERMISSION_DENIED"
            assert not [name for name in found if name.startswith("Access-Control")]
    assert ask(shown, "/api/score", body, Origin=own, Sec_Fetch_Site="same-origin")[0] == 200
    # A form or a script without CORS can only send these kinds, so none of them is taken.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(shown, "/api/score", body, Content_Type=kind)[0] == 400
    assert ask(shown, "/api/score", method="OPTIONS")[0] == 501


def test_nothing_of_a_prompt_is_logged_or_sent_back(shown: Server, caplog: pytest.LogCaptureFixture) -> None:
    secret = "zebra-4711-plum"
    with caplog.at_level(logging.DEBUG):
        for body in ({"text": secret * 9}, {"kind": "chat", "text": '{"' + secret}, {"model": "nope", "text": secret}):
            assert secret not in json.dumps(score(shown, **body)[1])
        assert secret.encode() not in ask(shown, "/api/score", ('{"text": "' + secret).encode())[2]
    assert secret not in caplog.text
    assert secret.encode() not in ask(shown, "/metrics")[2]


def test_the_box_is_off_unless_asked_for() -> None:
    with serving() as server:
        assert ask(server, "/")[0] == 200
        assert json.loads(ask(server, "/api/fleet")[2])["prompt"] == "off"
        assert ask(server, "/api/score", {})[0] == 404


def test_page_can_be_turned_off() -> None:
    with serving(page={"enabled": False, "prompt": True}) as server:
        for path in ("/", "/page/page.js", "/api/fleet"):
            assert ask(server, path)[0] == 404
        assert ask(server, "/api/score", {})[0] == 404
        assert ask(server, "/metrics")[0] == 200


def test_with_auth_the_box_needs_a_token(tmp_path: Path) -> None:
    """Who may not call Score may not ask by the page either; the fleet is shown as metrics are."""
    tokens, admins = tmp_path / "tokens", tmp_path / "admins"
    tokens.write_text(READER + "\n")
    admins.write_text("operator-token-0123456789\n")
    auth = {"tokens_file": str(tokens), "admin_tokens_file": str(admins)}
    body = {"model": "m", "kind": "prompt", "text": "x"}
    with serving(page={"prompt": True}, auth=auth) as server:
        assert json.loads(ask(server, "/api/fleet")[2])["prompt"] == "token"
        for headers in ({}, {"Authorization": "Bearer " + "x" * 20}, {"Authorization": READER}):
            status, found, answer = ask(server, "/api/score", body, **headers)
            assert status == 401
            assert found["WWW-Authenticate"] == "Bearer"
            assert json.loads(answer)["error"]["code"] == "UNAUTHENTICATED"
        # Let in: what follows is that this server knows no model.
        assert ask(server, "/api/score", body, Authorization=f"Bearer {READER}")[0] == 404
        assert READER.encode() not in ask(server, "/metrics")[2] + ask(server, "/api/fleet")[2]


def test_not_beside_tls(tmp_path: Path) -> None:
    """Plain HTTP would let in those whom the gRPC port asks for a certificate."""
    tls = {"tls.cert_file": "a", "tls.key_file": "b"}
    for key, value in (("page.prompt", True), ("http.listen", "127.0.0.1:1")):
        with pytest.raises(ConfigError) as caught:
            load_settings({**tls, key: value}, {}, None)
        assert str(caught.value).startswith(f"{key}: is plain HTTP and does not go with tls.cert_file")


def test_many_pods_are_cut_to_the_best(tmp_path: Path) -> None:
    with fleet(tmp_path, page={"prompt": True}) as server:
        for number in range(MAX_PODS):
            server.fleet.register(PodSpec(f"extra-{number}", MODEL, f"tcp://127.0.0.1:{20000 + number}"))
        answer = score(server)[1]
        assert (answer["pods_total"], len(answer["pods"])) == (MAX_PODS + 6, MAX_PODS)
        assert answer["pods"][0]["pod"] == WHOLE
