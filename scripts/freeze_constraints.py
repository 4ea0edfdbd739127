"""Write constraints.txt: the versions of this environment, without local and editable ones."""

import subprocess
import sys
from pathlib import Path

OWN = {"toile", "pip", "setuptools"}


def main() -> None:
    """Ask pip, and keep plain pins."""
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--exclude-editable"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    pins = []
    for line in frozen.splitlines():
        name, _, version = line.partition("==")
        if version and name.lower() not in OWN:
            # torch's build tag (+cpu, +cu130) is the machine's business
            pins.append(f"{name}=={version.partition('+')[0]}")
        elif " @ " in line and line.split(" @ ")[0].lower() == "torch":
            pins.append("torch==2.13.0")
    text = "# Versions that are tested together; `make constraints` writes this file.\n"
    Path("constraints.txt").write_text(text + "\n".join(pins) + "\n")


if __name__ == "__main__":
    main()
