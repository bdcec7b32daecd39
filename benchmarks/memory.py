"""What a claim costs in memory, by the index's own account and by the process's resident set."""

from pathlib import Path

from load import Chains, machine

from kvindex_server._core import Index


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    print(machine())
    print("| claims | pods | bytes per claim by RSS | by kvindex_index_bytes |\n|---|---|---|---|")
    for pods, rounds in ((1, 500), (64, 1000)):
        index, chains = Index(), Chains(5)
        streams = [index.add_stream(f"pod-{number}", 0) for number in range(pods)]
        before = resident_bytes()
        for number in range(rounds):
            messages, _, _ = chains.payloads(2048, 128)
            streams[number % pods].apply(messages)
        grown = resident_bytes() - before
        claims = index.claims
        print(f"| {claims} | {pods} | {grown / claims:.1f} | {index.bytes / claims:.1f} |")


if __name__ == "__main__":
    main()
