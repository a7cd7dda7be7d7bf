# SPDX-License-Identifier: Apache-2.0
"""Makes ``.venv`` with the pinned needs of a task: ``python build_support/make_venv.py build test``.

The names are files of ``requirements/``. A torch >= 2.13 that the calling interpreter can import is reused: its folder
is put on the path of ``.venv``, behind everything that is installed there, and nothing of the calling environment is
changed. Otherwise the torch of ``requirements/torch.txt`` is installed.
"""

import hashlib
import re
import subprocess
import sys
import venv
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
PYTHON = FOLDER / "bin" / "python"
MINIMUM_PYTHON = (3, 11)
MINIMUM_TORCH = (2, 13)


def main(names: list[str]) -> None:
    """Make the environment if there is none, and install what of the named files is not installed yet."""
    if sys.version_info < MINIMUM_PYTHON:
        sys.exit(f"Python >= 3.11 is needed, not {sys.version.split()[0]}; name another: make PYTHON=python3.12 ...")
    if not PYTHON.exists():
        make_environment()
    reused = reused_torch()
    if reused:
        print(f"Using the torch in {reused}", flush=True)
    files = [ROOT / "requirements" / f"{name}.txt" for name in [*names, *([] if reused else ["torch"])]]
    stamp = FOLDER / f"installed-{'-'.join(names)}"
    state = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    if stamp.exists() and stamp.read_text() == state:
        return
    print(f"Installing into .venv: {', '.join(path.stem for path in files)}", flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run([*command, *(part for path in files for part in ("-r", str(path)))], check=False)
    if result.returncode:
        sys.exit(f"pip could not install {', '.join(str(path.relative_to(ROOT)) for path in files)}")
    stamp.write_text(state)


def make_environment() -> None:
    """Make ``.venv``, or say which package of the system is missing."""
    if util.find_spec("ensurepip") is None:
        sys.exit("this Python cannot make virtual environments; Debian and Ubuntu have it in the package python3-venv")
    print("Making .venv", flush=True)
    venv.create(FOLDER, with_pip=True, symlinks=True)


def reused_torch() -> str | None:
    """Return the folder outside ``.venv`` that its torch comes from, or None if it has or needs one of its own."""
    for link in FOLDER.glob("lib/python*/site-packages/reused_torch.pth"):  # made before
        folder = link.read_text().strip()
        if (Path(folder) / "torch").is_dir():
            return folder
        link.unlink()
    site_packages = FOLDER / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not site_packages.is_dir() or (site_packages / "torch").is_dir():  # another Python's, or it has its own torch
        return None
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None or release(metadata.version("torch")) < MINIMUM_TORCH:
        return None
    folder = str(Path(spec.origin).resolve().parent.parent)
    (site_packages / "reused_torch.pth").write_text(f"{folder}\n")
    return folder


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: ``2.13.0+cpu`` -> ``(2, 13)``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


if __name__ == "__main__":
    main(sys.argv[1:])
