"""Settings: precedence, one clear line per error, and a reference table that cannot drift."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvindex_server.config import (
    ConfigError,
    Settings,
    describe,
    load_settings,
    settings_table,
    split_address,
)
from kvindex_server.pods import PodSpec

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "kvindex.yaml"
    file.write_text(text)
    return file


def fails(tmp_path: Path, text: str = "", env: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, env or {}, write(tmp_path, text))
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(tmp_path / "kvindex.yaml"), "FILE")


def test_defaults() -> None:
    settings = load_settings({}, {}, None)
    assert settings == Settings()
    assert settings.listen == "0.0.0.0:50051"
    assert settings.tier_weights == {"gpu": 1.0, "cpu": 0.8, "disk": 0.5}
    assert settings.limits.max_prompt_bytes == 16 * 1024 * 1024


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().listen = "x:1"  # type: ignore[misc]


def test_flags_beat_env_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "listen: a:1\nmetrics_listen: a:2\nadmin_listen: a:3\n"
        "limits: {max_tokens: 7, max_pods: 8}\nlog: {level: error}\n",
    )
    env = {
        "KVINDEX_LISTEN": "b:1",
        "KVINDEX_METRICS_LISTEN": "b:2",
        "KVINDEX_LIMITS__MAX_TOKENS": "9",
        "KVINDEX_LOG__LEVEL": "WARNING",
        "OTHER": "x",
    }
    settings = load_settings({"listen": "c:1", "log.level": "debug", "log.format": None}, env, file)
    assert (settings.listen, settings.metrics_listen, settings.admin_listen) == ("c:1", "b:2", "a:3")
    assert (settings.limits.max_tokens, settings.limits.max_pods) == (9, 8)
    assert settings.limits.max_keys == Settings().limits.max_keys
    assert (settings.log.level, settings.log.format) == ("debug", "json")


def test_env_json_and_nesting() -> None:
    env = {
        "KVINDEX_MODELS": '[{"name": "m", "aliases": ["n"]}]',
        "KVINDEX_TIER_WEIGHTS": '{"GPU": 2, "nvme": 0}',
        "KVINDEX_LIMITS": '{"max_tokens": 5, "max_pods": 6}',
        "KVINDEX_LIMITS__MAX_PODS": "7",
        "KVINDEX_ADMIN_LISTEN": "",
        "KVINDEX_SERVER__DRAIN_SECONDS": "1.5",
    }
    settings = load_settings({}, env, None)
    assert settings.models[0].aliases == ("n",)
    assert settings.tier_weights == {"gpu": 2.0, "nvme": 0.0}
    assert (settings.limits.max_tokens, settings.limits.max_pods) == (5, 7)
    assert settings.admin_listen is None
    assert settings.server.drain_seconds == 1.5


def test_every_described_variable_is_accepted() -> None:
    for row in describe():
        if not row.environment:
            continue
        value = row.default or ("[]" if row.type.startswith("list") else "")
        load_settings({}, {row.environment: value}, None)


def test_kubernetes_service_links_are_ignored() -> None:
    env = {
        "KVINDEX_SERVICE_HOST": "10.0.0.1",
        "KVINDEX_SERVER_SERVICE_HOST": "10.0.0.1",
        "KVINDEX_SERVER_SERVICE_PORT_GRPC": "50051",
        "KVINDEX_SERVER_PORT": "tcp://10.0.0.1:50051",
        "KVINDEX_SERVER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "KVINDEX_SERVER_PORT_50051_TCP": "tcp://10.0.0.1:50051",
    }
    assert load_settings({}, env, None) == Settings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lisen: a:1", "lisen: unknown key; did you mean listen? (from FILE)"),
        ("limits: {max_tokns: 1}", "limits.max_tokns: unknown key; did you mean max_tokens? (from FILE)"),
        (
            "models: [{name: m, tokeniser: x}]",
            "models[0].tokeniser: unknown key; did you mean tokenizer? (from FILE)",
        ),
        ("models: [{block_size: 1}]", "models[0].name: is required (from FILE)"),
        ("limits: 3", "limits: must be a mapping (from FILE)"),
        ("models: [3]", "models[0]: must be a mapping (from FILE)"),
        ("limits: {max_tokens: many}", "limits.max_tokens: must be a valid integer"),
        ("limits: {max_tokens: 0}", "limits.max_tokens: must be greater than or equal to 1"),
        ("limits: {max_tokens: yes}", "limits.max_tokens: must be a number, not a boolean"),
        ("stream: {on_gap: ignore}", "stream.on_gap: must be 'keep' or 'drop'"),
        ("log: {level: loud}", "log.level: must be 'debug', 'info', 'warning' or 'error'"),
        ("listen: 50051", "listen: must be a valid string"),
        ("listen: localhost", "listen: must have the form host:port"),
        ("listen: '::1:50051'", "listen: must have the form host:port"),
        ("listen: a:65536", "listen: port must be in 0..65535"),
        (
            "listen: a:90\nmetrics_listen: 0.0.0.0:90",
            "metrics_listen: is the same address as listen (from FILE)",
        ),
        ("tier_weights: {}", "tier_weights: must name at least one tier"),
        ("tier_weights: {gpu: -1}", "tier_weights.gpu: must be a finite number >= 0"),
        ("tier_weights: {gpu: .nan}", "tier_weights.gpu: must be a finite number >= 0"),
        ("tier_weights: {gpu: .inf}", "tier_weights.gpu: must be a finite number >= 0"),
        ("tier_weights: {gpu: 1, GPU: 2}", "tier_weights.GPU: is given twice"),
        ("models: [{name: a}, {name: a}]", "models[1].name: the name 'a' is already used by models[0].name"),
        ("models: [{name: a, loras: [b]}, {name: c, aliases: [b]}]", "models[1].aliases[0]: the name 'b'"),
        ("models: [{name: a, tokenize_url: 'ftp://x'}]", "models[0].tokenize_url: must"),
        ("text: {known_words: 3000}", "text.known_words: must be a power of two"),
        ("text: {cache_bytes: -1}", "text.cache_bytes: must be greater than or equal to 0"),
        ("text: {tokenizer_dirs: [/nowhere]}", "text.tokenizer_dirs[0]: /nowhere is not a directory"),
        ("models: [{name: a, tokenizer: /nowhere}]", "models[0].tokenizer: /nowhere is not a directory"),
        (
            "pods: [{pod: p, model: m, endpoint: 'p:1'}]",
            "pods[0].endpoint: must have the form tcp://host:port",
        ),
        ("pods: [{pod: p, model: m}]", "pods[0].endpoint: is required"),
        (
            "pods: [{pod: p, model: m, endpoint: 'tcp://p:1', ranks: 3, replay_endpoint: 'tcp://p:3'}]",
            "pods[0].replay_endpoint: its ports overlap",
        ),
        (
            "pods: [{pod: p, model: m, endpoint: 'tcp://p:1'}, {pod: p, model: m, endpoint: 'tcp://q:1'}]",
            "pods[1].pod: 'p' is already given by pods[0]",
        ),
        (
            "pods: [{pod: p, model: m, endpoint: 'tcp://p:1', ranks: 2}, {pod: q, model: m, endpoint: 'tcp://p:2'}]",
            "pods[1].endpoint: port 2 (rank 0) is read by pods[0] too",
        ),
        ("listen: [", "FILE: line "),
        ("listen: a:1\nlisten: b:1", "FILE: line 2: key listen is given twice"),
        ("- a", "FILE: must be a mapping of settings"),
        ("1: a", "1: unknown key"),
    ],
)
def test_file_errors_name_the_key(tmp_path: Path, text: str, line: str) -> None:
    assert fails(tmp_path, text).startswith(line)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("KVINDEX_LISEN", "a:1", "KVINDEX_LISEN: unknown setting; did you mean KVINDEX_LISTEN?"),
        ("KVINDEX_LIMITS__NONE", "1", "KVINDEX_LIMITS__NONE: unknown setting"),
        ("KVINDEX_TIER_WEIGHTS__GPU", "1", "KVINDEX_TIER_WEIGHTS__GPU: unknown setting"),
        ("KVINDEX_LISTEN__X", "1", "KVINDEX_LISTEN__X: unknown setting"),
        ("KVINDEX_listen", "a:1", "KVINDEX_listen: unknown setting"),
        ("KVINDEX_MODELS", "[", "KVINDEX_MODELS: is not valid JSON"),
        (
            "KVINDEX_LIMITS__MAX_TOKENS",
            "many",
            "limits.max_tokens: must be a valid integer, unable to parse string as an integer"
            " (from KVINDEX_LIMITS__MAX_TOKENS)",
        ),
        ("KVINDEX_HASH_SEED", "-1", "hash_seed: must be greater than or equal to 0 (from KVINDEX_HASH_SEED)"),
        (
            "KVINDEX_TIER_WEIGHTS",
            '{"gpu": NaN}',
            "tier_weights.gpu: must be a finite number >= 0 (from KVINDEX_TIER_WEIGHTS)",
        ),
    ],
)
def test_environment_errors_name_the_key(tmp_path: Path, name: str, value: str, line: str) -> None:
    assert fails(tmp_path, env={name: value}) == line or fails(tmp_path, env={name: value}).startswith(line + ";")


def test_a_variable_cannot_refine_what_is_no_mapping(tmp_path: Path) -> None:
    assert fails(tmp_path, "log: loud", env={"KVINDEX_LOG__LEVEL": "info"}).startswith("log: must be a mapping")


def test_flag_errors_name_the_flag(tmp_path: Path) -> None:
    assert fails(tmp_path, metrics_listen="x").endswith("(from --metrics-listen)")


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_settings({}, {}, tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_settings({}, {}, binary)


def test_tokenizers_merge_into_models(tmp_path: Path) -> None:
    file = write(tmp_path, "models: [{name: a, block_size: 16}, {name: b}]")
    settings = load_settings({}, {}, file, tokenizers={"a": str(tmp_path), "c": str(tmp_path)})
    assert [(model.name, model.tokenizer) for model in settings.models] == [
        ("a", str(tmp_path)),
        ("b", None),
        ("c", str(tmp_path)),
    ]
    assert settings.models[0].block_size == 16


def test_pods_become_specs(tmp_path: Path) -> None:
    pod = "pod: p, model: m, endpoint: 'tcp://p:1', ranks: 2, replay_endpoint: 'tcp://p:9', bind: true"
    text = f"pods: [{{{pod}}}]"
    assert load_settings({}, {}, write(tmp_path, text)).pods[0].spec() == PodSpec(
        pod="p", model="m", endpoint="tcp://p:1", replay_endpoint="tcp://p:9", ranks=2, bind=True
    )


def test_an_alias_does_not_hide_a_duplicate(tmp_path: Path) -> None:
    first = "{pod: p, model: a, endpoint: 'tcp://p:1'}"
    second = "{pod: p, model: m, endpoint: 'tcp://q:1'}"
    text = f"models: [{{name: m, aliases: [a]}}]\npods: [{first}, {second}]"
    assert fails(tmp_path, text) == "pods[1].pod: 'p' is already given by pods[0] (from FILE)"


def test_same_port_zero_and_different_hosts_are_fine() -> None:
    load_settings({"listen": "a:0", "metrics_listen": "a:0"}, {}, None)
    load_settings({"listen": "a:1", "metrics_listen": "b:1"}, {}, None)


def test_split_address() -> None:
    assert split_address("[::1]:0") == ("[::1]", 0)
    assert split_address("localhost:50051") == ("localhost", 50051)
    for wrong in ("", ":1", "a", "a:", "a:x", "a:-1", "a:١", "::1", "a b:1"):
        with pytest.raises(ValueError):
            split_address(wrong)


def test_documented_table_is_the_schema() -> None:
    found = re.search(r"<!-- settings -->\n(.*)<!-- /settings -->", DOCS.read_text(), re.DOTALL)
    assert found is not None
    assert found.group(1) == settings_table()


def test_every_setting_has_a_meaning() -> None:
    assert all(row.meaning and row.type for row in describe())


def test_documented_example_loads(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    settings = load_settings({}, {}, write(tmp_path, found.group(1).replace("/models/llama", str(tmp_path))))
    assert settings.pods[0].ranks == 2


def test_documented_error_line_is_true(tmp_path: Path) -> None:
    line = fails(tmp_path, "limits: {max_tokns: 1}").replace("FILE", "kvindex.yaml")
    assert f"kvindex-server: config: {line}\n" in DOCS.read_text()


def test_defaults_survive_a_round_trip() -> None:
    assert Settings.model_validate(json.loads(Settings().model_dump_json())) == Settings()
