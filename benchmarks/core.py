"""The native core alone, without Python and sockets: builds native/bench and prints its table (argument: claims)."""

import os
import subprocess
import sys
from pathlib import Path

from load import machine

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"


def main() -> None:
    print(machine(), flush=True)
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DKVINDEX_NATIVE_TESTS=ON"]
    for command in (
        ["cmake", "-S", str(ROOT / "native"), "-B", str(BUILD), *options],
        ["cmake", "--build", str(BUILD), "--target", "core_bench"],
    ):
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([str(BUILD / "core_bench"), *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
