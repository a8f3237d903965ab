"""Looks what .ci/constraints.txt pins up in PyPI's database of vulnerabilities, once a day; a part of `make lint`.

A known vulnerability ends with 1. Where the database cannot be reached it says so, and ends with 0.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

PINNED = Path(__file__).parent / "constraints.txt"
ANSWER = Path(sys.prefix) / "audited.json"
COMMAND = [sys.executable, "-m", "pip_audit", "--requirement", PINNED, "--no-deps", "--disable-pip", "--timeout", "5",
           "--progress-spinner", "off", "--format", "json", "--output", ANSWER]  # fmt: skip


def main() -> int:
    if ANSWER.exists() and ANSWER.stat().st_mtime > max(PINNED.stat().st_mtime, time.time() - 24 * 3600):
        return 0
    ANSWER.unlink(missing_ok=True)
    try:
        subprocess.run(COMMAND, capture_output=True, timeout=40)
        packages = json.loads(ANSWER.read_text())["dependencies"]
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"audit: the pinned packages were not looked up, for PyPI's database cannot be reached: {error}")
        return 0
    unknown = [package["name"] for package in packages if "vulns" not in package]
    if unknown:
        print(f"audit: {len(unknown)} of {len(packages)} pinned packages are not in the database that was reached")
    found = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", [])]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        print(f"audit: {package['name']} {package['version']} has {vulnerability['id']}, fixed in {fixed}")
    if found:
        ANSWER.unlink()  # so that it is said again
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
