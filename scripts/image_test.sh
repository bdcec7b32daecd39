#!/usr/bin/env bash
# Runs the container image as a cluster would run it at its strictest, with a simulated engine in a container beside it,
# and asks for a score. Prints what it does and what it measures; needs podman or docker.
# IMAGE names the image.
set -euo pipefail
image=${IMAGE:-kvindex-server:dev}
# Whichever has it: docker and podman keep their images apart, podman and buildah together.
engine=""
for candidate in docker podman; do
  if "$candidate" image inspect "$image" > /dev/null 2>&1; then
    engine=$candidate
    break
  fi
done
[ -n "$engine" ] || { echo "neither docker nor podman has an image $image: make image" >&2; exit 1; }
model=demo-model
name=kvindex-image-test-$$

# Limits below this machine's own: a container may be refused the default ones where CAP_SYS_RESOURCE is missing.
hardened=(--network host --read-only --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp
  --ulimit nofile=4096:4096 --ulimit nproc=4096:4096)
before=()
if [ "$engine" = podman ]; then
  # Needs neither systemd nor the newest kernel interfaces.
  before=(--cgroup-manager cgroupfs)
  ! command -v runc > /dev/null || before+=(--runtime runc)
fi

container() { "$engine" "${before[@]}" "$@"; }
tidy() { container rm --force "$name" "$name-engine" > /dev/null 2>&1 || true; }
trap tidy EXIT
fail() { echo "FAILED: $*" >&2; exit 1; }
now() { date +%s%N; }

echo "## $("$engine" --version), $(uname -sr), $(nproc) CPUs"
echo "image: $(container image inspect --format '{{.Size}}' "$image") bytes with its base; user $(container image inspect --format '{{.Config.User}}' "$image")"
echo "layers: $(container history --format '{{.Size}}' "$image" | paste -sd' ')"

echo "## As whom it runs, and what it may do"
container run --rm "${hardened[@]}" --entrypoint python "$image" -c '
import os
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
print("uid", os.getuid(), "capabilities", status["CapEff"], "no new privileges", status["NoNewPrivs"])
assert os.getuid() == 65532 and int(status["CapEff"], 16) == 0 and status["NoNewPrivs"] == "1"
try:
    open("/opt/kvindex/written", "w")
except OSError as error:
    print("write to the image:", error.strerror)
else:
    raise SystemExit("the root file system can be written to")
import json
bom = json.load(open("/opt/kvindex/sbom.cdx.json"))
kinds = [each["purl"].partition("/")[0] for each in bom["components"] if "purl" in each]
print("sbom:", bom["bomFormat"], bom["specVersion"], {kind: kinds.count(kind) for kind in sorted(set(kinds))})
assert "pkg:deb" in kinds and "pkg:pypi" in kinds
' || fail "the container is not as restricted as it should be"

echo "## Start"
began=$(now)
container run --detach --name "$name" "${hardened[@]}" "$image" serve --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 > /dev/null
addresses=""
for _ in $(seq 600); do
  addresses=$(container logs "$name" 2>&1 | grep -m1 '^listening ' || true)
  [ -z "$addresses" ] || break
  sleep 0.05
done
[ -n "$addresses" ] || { container logs "$name" >&2; fail "no address was printed"; }
read -r _ grpc metrics <<< "$addresses"
grpc=${grpc#grpc=} metrics=${metrics#metrics=}
for _ in $(seq 600); do
  ! curl -fsS "http://$metrics/readyz" > /dev/null 2>&1 || break
  sleep 0.05
done
curl -fsS "http://$metrics/readyz" > /dev/null || fail "not ready"
echo "$addresses"
echo "ready $((($(now) - began) / 1000000)) ms after the run command, container and polling included"
pid=$(container inspect --format '{{.State.Pid}}' "$name")
echo "resident memory when idle: $(awk '/VmRSS/ {print $2 / 1024}' "/proc/$pid/status") MiB"

echo "## An engine in another container of the same image announces the first 64 of 80 tokens"
container run --detach --name "$name-engine" "${hardened[@]}" --env "SERVER=$grpc" --env "MODEL=$model" --entrypoint python "$image" -c '
import os, time, grpc
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb, kvindex_pb2_grpc as rpc
from kvindex_server.simulate.pod import SimulatedPod
engine = SimulatedPod("10.0.0.7:8000", os.environ["MODEL"])
engine.start()
engine.generate(range(64), output_tokens=1).result()
pod = pb.RegisterPodRequest(pod=engine.pod, model=engine.model, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
rpc.KVIndexAdminStub(grpc.insecure_channel(os.environ["SERVER"])).RegisterPod(pod, timeout=20)
time.sleep(120)
' > /dev/null

tokens=$(seq -s, 0 79)
answer=""
for _ in $(seq 100); do
  answer=$(container exec "$name" kvindex score --server "$grpc" --model "$model" --tokens "$tokens" 2>&1 || true)
  ! grep -q EXACT <<< "$answer" || break
  sleep 0.2
done
echo "\$ kvindex score --server $grpc --model $model --tokens 0,1,...,79"
echo "$answer"
grep -q '4/5' <<< "$answer" || { container logs "$name" >&2; fail "expected a match of 4 of 5 blocks"; }

echo "## End"
began=$(now)
container stop --time 30 "$name" > /dev/null
code=$(container inspect --format '{{.State.ExitCode}}' "$name")
echo "SIGTERM: exit code $code after $((($(now) - began) / 1000000)) ms"
[ "$code" = 0 ] || fail "it did not end by itself"
echo "passed"
