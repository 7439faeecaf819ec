"""Analyse the machine code that nvdisasm prints: the innermost loops of each kernel, and their loads and instructions.

    python tools/sass.py csrc/cuda/grpo_loss_cluster.cu     # instructions per logit of the cluster kernel's loops, sm_90

Compiling a .cu file needs nvcc; the disassembler is the one in Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Loop", "cluster_passes", "disassembled", "kernels", "loops"]

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {".128": 16, ".64": 8, ".U16": 2}


@dataclass(frozen=True)
class Loop:
    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, i) is not None for i in self.instructions)

    def bytes(self, opcode: str) -> int:
        """Bytes that a thread moves in one iteration by instructions of this name: LDG, LDS, STS."""
        moves = [found.group() for i in self.instructions if (found := re.search(rf"\b{opcode}\S*", i))]  # an address may hold .64 too
        return sum(next((width for name, width in WIDTHS.items() if name in move), 4) for move in moves)


def disassembled(cubin: bytes) -> str:
    import triton

    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout


def kernels(code: str) -> dict[str, str]:
    """mangled name -> its lines."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^\s,]+),.*$", code, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def loops(code: str) -> list[Loop]:
    """The innermost loops, in the order of the code."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif code_line := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code_line.group(1))
    found = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if jump and labels.get(jump.group(1), end + 1) <= end:
            found.append((labels[jump.group(1)], end))
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)]
    return [Loop(instructions[a : b + 1]) for a, b in inner]


def cluster_passes(code: str, element: int) -> dict[str, float]:
    """Instructions per logit of a kernel's loops over its slice: maximum, sums, gradient without and with entropy, stored by bulk copy.

    Also the number of "fences" of the whole GPU and of "invalidations" of L1 in the code of the kernel.
    """
    found: dict[str, list[float]] = {"maximum": [], "sums": [], "gradients": []}
    for loop in loops(code):
        logits, exponentials, others = loop.bytes(r"LDS\.128") / element, loop.count(r"MUFU\.EX2"), loop.count(r"\b(?:LDG|STG|ST|SYNCS)\b")
        if others or logits * element < 32:
            continue  # direct stores, remainders
        if exponentials >= logits:
            found["gradients" if loop.bytes("STS") / element == logits else "sums"].append(len(loop.instructions) / logits)
        elif exponentials == 0 and loop.bytes("STS") == 0:
            found["maximum"].append(len(loop.instructions) / logits)
    assert all(found.values()) and len(found["gradients"]) == 2, f"the loops have changed: {found}"
    plain, entropy = sorted(found["gradients"])
    whole = {"fences": len(re.findall(r"\bMEMBAR\.\S*\.GPU\b", code)), "invalidations": len(re.findall(r"\bCCTL\.IVALL\b", code))}
    return {"maximum": max(found["maximum"]), "sums": max(found["sums"]), "gradient": plain, "gradient+entropy": entropy, **whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    arguments = parser.parse_args()
    found = compiled_passes(arguments.source)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    for name, passes in found.items():
        whole = passes["maximum"] + passes["sums"]
        each = ", ".join(f"{what} {number:.2f}" for what, number in passes.items())
        print(f"{name}: {each}; together {whole + passes['gradient']:.2f}, with entropy {whole + passes['gradient+entropy']:.2f}")


def compiled_passes(source: Path) -> dict[str, dict[str, float]]:
    """Of each kernel of the cluster file on sm_90: "bf16", "fp16+softcap", ... -> cluster_passes."""
    build = types.SimpleNamespace(**runpy.run_path(str(ROOT / "grpo_fast" / "ops" / "build.py")))
    nvcc = build.nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc here; expected a CUDA toolkit.")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, *build.NVCC_FLAGS, f"-I{ROOT / 'csrc'}", "-arch=sm_90", "-cubin", str(source), "-o", str(cubin)]
        subprocess.run(command, check=True)
        code = disassembled(cubin.read_bytes())
    found = {}
    for mangled, body in kernels(code).items():
        if match := re.search(r"cluster_kernelI(?:f|\S*?(BFloat|Half)E)Lb([01])E", mangled):
            dtype = {"BFloat": "bf16", "Half": "fp16", None: "fp32"}[match[1]]
            found[dtype + "+softcap" * (match[2] == "1")] = cluster_passes(body, 4 if dtype == "fp32" else 2)
    return found


if __name__ == "__main__":
    main()
