"""Compile every CUDA file for the supported GPUs, without a GPU and without torch, and print registers and spills of each kernel.

    python tools/nvcc_check.py [--json FILE]

Without nvcc it prints why it was skipped. The report is kept under build/nvcc and printed again until the sources change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90", "100")
BUILD = types.SimpleNamespace(**runpy.run_path(str(ROOT / "grpo_fast" / "ops" / "build.py")))


def compile_report(nvcc: str, source: Path) -> str:
    """One line per kernel and architecture; raises SystemExit with the compiler's words if it does not compile."""
    headers = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in [source, *headers, Path(__file__), Path(BUILD.__file__)])).hexdigest()[:16]
    kept = ROOT / "build" / "nvcc" / f"{source.stem}.{key}.txt"
    if kept.is_file():
        return kept.read_text()
    kept.parent.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = [nvcc, *BUILD.NVCC_FLAGS, "-Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}", *targets]
    run = subprocess.run([*command, "-c", str(source), "-o", str(kept.with_suffix(".o"))], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"nvcc does not compile {source.relative_to(ROOT)}:\n{run.stdout}{run.stderr}")
    report = "".join(f"  {line}\n" for line in sorted(set(resource_lines(run.stderr))))
    kept.with_suffix(".o").unlink()
    kept.write_text(report)
    return report


def resource_lines(ptxas: str) -> list[str]:
    """ptxas -v in short: `sm_90  kernel  32 registers, 0 bytes spilled`."""
    lines, kernel, arch, spilled = [], "", "", 0
    for line in ptxas.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel, arch = found.groups()
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(found.group(1)) + int(found.group(2))
        elif found := re.search(r"Used (\d+) registers", line):
            lines.append(f"{arch:<7} {readable(kernel):<60} {found.group(1):>3} registers, {spilled} bytes spilled")
    return lines


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters; as it is where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=False).stdout.strip()
    name = re.sub(r"\(.*\)$", "", name.replace("(anonymous namespace)", "")).removeprefix("void ")
    return re.sub(r"[A-Za-z_0-9]*::", "", name)


def as_records(report: str) -> list[dict[str, object]]:
    """The lines of a report as dictionaries: arch, kernel, registers, spilled (bytes)."""
    pattern = r"\s*(\w+)\s+(.*?)\s+(\d+) registers, (\d+) bytes spilled"
    found = [re.match(pattern, line) for line in report.splitlines()]
    return [{"arch": m[1], "kernel": m[2], "registers": int(m[3]), "spilled": int(m[4])} for m in found if m]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the kernels' registers and spills to this file as well")
    output = parser.parse_args().json
    records: list[dict[str, object]] = []
    files = sorted((ROOT / "csrc").rglob("*.cu"))
    nvcc = BUILD.nvcc()
    if nvcc is None:
        print(f"nvcc check skipped: no nvcc here ({len(files)} CUDA files not compiled)")
        return
    for source in files:
        report = compile_report(nvcc, source)
        print(f"nvcc: {source.relative_to(ROOT)} compiles for sm_{', sm_'.join(ARCHS)}\n{report}", end="")
        records += as_records(report)
    if output:
        output.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
