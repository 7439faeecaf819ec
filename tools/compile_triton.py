"""Compile every Triton kernel for real GPUs, on any machine, and print registers, spills and instructions per logit.

    python tools/compile_triton.py                      # every variant for every target: a few minutes
    python tools/compile_triton.py --sample             # every form of a kernel once, with types and targets in turn: half a minute
    python tools/compile_triton.py --target sm_90 --only gradient --dtype bf16

Needs neither a GPU nor a driver: Triton contains an assembler and a disassembler. Instructions are counted in the machine code of the loop
over plain blocks, which processes all but two blocks of a row. The exit status is 1 if a kernel spills or exceeds its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is decorated
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_fast.kernels import grpo_loss, kept_products, scale, token_logprobs
from grpo_fast.kernels.loss_settings import LossSettings
from grpo_fast.loss.config import SURROGATES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Instructions per logit, on each of NVIDIA's GPUs and for each type of the logits. A soft cap is a tanh.
BOUNDS = {"sums": 9.0, "sums+entropy": 10.5, "gradient": 10.0, "gradient+entropy": 10.0}
BOUNDS |= {"sums+softcap": 24.0, "sums+entropy+softcap": 24.0, "gradient+softcap": 32.0, "gradient+entropy+softcap": 32.0}


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time arguments."""

    name: str
    kernel: Any
    dtype: str  # of the logits
    constants: dict[str, Any]
    warps: int = 4
    absent: tuple[str, ...] = ()  # optional tensors that are None

    def source(self) -> ASTSource:
        """The kernel with the types of its arguments: those of the annotations and of the tensors."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if parameter.is_constexpr or name in self.absent:
                signature[name] = "constexpr"
                constants[(index,)] = self.constants.get(name)
            elif name == "settings":
                signature[name] = LossSettings._make(["fp32"] * len(LossSettings._fields))
            else:
                signature[name] = parameter.annotation_type or self.pointer(name)
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs={})

    def pointer(self, name: str) -> str:
        if name in ("logits_ptr", "gradient_ptr", "x_ptr", "hidden_ptr", "weight_ptr"):
            return f"*{self.dtype}"
        ids = dict.fromkeys(("token_ids_ptr", "columns_ptr", "places_ptr"), "*i64")
        return (ids | {"mask_ptr": "*i1", "computed_ptr": "*i1"}).get(name, "*fp32")


@dataclass
class Result:
    """Properties of a compiled variant."""

    variant: str
    dtype: str
    target: str
    block: int
    warps: int
    registers: int
    spills: int  # bytes, or instructions if the assembler reports those
    shared: int
    per_logit: float | None = None  # instructions in the loop over plain blocks
    vector_loads: bool | None = None  # whether that loop loads 16 bytes at a time
    bound: float | None = None
    wrong: list[str] = field(default_factory=list)


def variants() -> list[Variant]:
    """Every kernel with every combination of compile-time arguments that changes its machine code."""
    found = []
    for dtype in BYTES:
        for entropy in (False, True):
            for softcap in (False, True):
                name = "+entropy" * entropy + "+softcap" * softcap
                shape = {"BLOCK_V": token_logprobs.SOFTCAP_BLOCK if softcap else token_logprobs.BLOCK, "HAS_SOFTCAP": softcap}
                constants = shape | {"WANT_ENTROPY": entropy}
                found.append(Variant(f"sums{name}", token_logprobs._token_sums_kernel, dtype, constants, token_logprobs.WARPS))
                for same in (True, False):
                    constants = shape | {"HAS_ENTROPY": entropy, "SAME_PHASE": same}
                    form = f"gradient{name}" + "+unaligned" * (not same)
                    kernel = token_logprobs._token_gradient_kernel
                    found.append(Variant(form, kernel, dtype, constants, token_logprobs.WARPS))
        blocks = {"BLOCK_K": kept_products.BLOCK_K, "BLOCK_D": kept_products.BLOCK_D}
        for kernel in (
            kept_products._kept_logits_kernel,
            kept_products._kept_hidden_gradient_kernel,
            kept_products._add_kept_weight_gradient_kernel,
        ):
            name = kernel.fn.__name__.removesuffix("_kernel").strip("_").replace("_", " ")
            for aligned in (True, False):
                form = name + "+unaligned" * (not aligned)
                found.append(Variant(form, kernel, dtype, blocks | {"ALIGNED": aligned}, kept_products.WARPS))
        found.append(Variant("scale", scale._scale_kernel, dtype, {"BLOCK": scale.BLOCK}, scale.WARPS))
    tokens = {"BLOCK_N": token_logprobs.TOKENS_BLOCK}
    found.append(Variant("logprobs", token_logprobs._token_logprobs_kernel, "bf16", tokens | {"WANT_ENTROPY": True, "HAS_SOFTCAP": True}))
    optional = ("entropy_weights_ptr", "old_logprobs_ptr", "ref_logprobs_ptr", "rollout_weights_ptr", "temperatures_ptr")
    for surrogate, name in enumerate(SURROGATES):
        for absent in ((), optional) if name not in ("vespo", "gmpo") else ():  # they reach the kernels as REINFORCE and clip
            constants = tokens | {"SURROGATE": surrogate, "HAS_SOFTCAP": not absent}
            form = f"terms+{name}" + "+bare" * bool(absent)
            found.append(Variant(form, grpo_loss._grpo_loss_terms_kernel, "bf16", constants, absent=absent))
    found.append(Variant("total", grpo_loss._grpo_loss_total_kernel, "fp32", {"BLOCK": grpo_loss.TOTAL_BLOCK}))
    return found


def compilations(found: list[Variant], targets: list[str], sample: bool) -> list[tuple[Variant, str]]:
    """Each variant with the targets to compile it for.

    sample: each form of a kernel once, for a type of the logits and a target that change from form to form; all targets for the variants
    whose instructions docs/kernels.md states (bf16, no soft cap), and one with another type.
    """
    stated = [name for name in BOUNDS if "softcap" not in name]
    forms: dict[str, list[Variant]] = {}
    for variant in found:
        forms.setdefault(variant.name, []).append(variant)
    chosen = []
    for index, (name, types) in enumerate(forms.items()):
        everywhere = [variant for variant in types if not sample or (name in stated and variant.dtype == "bf16")]
        chosen += [(variant, target) for variant in everywhere for target in targets]
        if rest := [variant for variant in types if variant not in everywhere]:
            chosen.append((rest[(index + index // 6) % len(rest)], targets[index % len(targets)]))
    return chosen


def compile_variant(variant: Variant, target_name: str) -> Result:
    """Compile one variant for one target."""
    target = TARGETS[target_name]
    options = {"num_warps": variant.warps}
    if variant.kernel is token_logprobs._token_sums_kernel and target.backend == "cuda":
        entropy, softcap = variant.constants["WANT_ENTROPY"], variant.constants["HAS_SOFTCAP"]
        capability = (int(target.arch) // 10, int(target.arch) % 10)
        options |= token_logprobs.register_limit(BYTES[variant.dtype], entropy, softcap, capability)
    compiled = triton.compile(variant.source(), target=target, options=options)
    block = next(value for name, value in variant.constants.items() if name.startswith("BLOCK"))
    result = Result(variant.name, variant.dtype, target_name, block, variant.warps, 0, 0, compiled.metadata.shared)
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        result.registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        result.spills = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        if result.spills:
            result.wrong.append("spills")
        return result
    usage, code = _disassemble(compiled.asm["cubin"])
    result.registers = _number(r"REG:(\d+)", usage)
    result.spills = _number(r"LOCAL:(\d+)", usage) + len(re.findall(r"\b(?:LDL|STL)\b", code))
    if result.spills:
        result.wrong.append("spills")
    loop = None
    if "BLOCK_V" in variant.constants:
        exponentials = 2 if variant.constants["HAS_SOFTCAP"] else 1
        loop = _plain_loop(code, block // (32 * variant.warps), BYTES[variant.dtype], exponentials)
    if loop is not None:
        result.per_logit, result.vector_loads = loop
        result.bound = BOUNDS[variant.name.removesuffix("+unaligned")]
        if result.per_logit > result.bound:
            result.wrong.append(f"more than {result.bound} instructions per logit")
        if not result.vector_loads and not variant.name.endswith("unaligned"):
            result.wrong.append("no 16-byte loads")
    elif "BLOCK_V" in variant.constants:
        result.wrong.append("the loop over plain blocks was not found")
    return result


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return usage.stdout, sass.disassembled(cubin)


def _plain_loop(code: str, lanes: int, element: int, exponentials: int) -> tuple[float, bool] | None:
    """(instructions per logit, whether by 16-byte loads) of the loop over plain blocks; None if there is none.

    It is the cheapest innermost loop that loads at least a whole block and has all exponentials of each logit that it loads. The search
    for the maximum has one less: with a soft cap it still has that of the tanh.

    Args:
        lanes: logits per thread and block.
        element: bytes of a logit.
        exponentials: of a logit: one, and with a soft cap another one in the tanh.
    """
    found = []
    for loop in sass.loops(code):
        logits = loop.bytes("LDG") // element
        if logits >= lanes and loop.count(r"MUFU\.EX2") >= exponentials * logits:
            found.append((len(loop.instructions) / logits, loop.count(r"\bLDG\b") == loop.count(r"\bLDG\S*\.128")))
    return min(found, default=None)


def table(results: list[Result]) -> str:
    """The results as a text table."""
    rows: list[tuple[str, ...]] = [("kernel", "logits", "target", "block", "warps", "registers", "spills", "shared", "instr/logit", "")]
    for r in results:
        per_logit = "" if r.per_logit is None else f"{r.per_logit:.2f}" + (f" <= {r.bound:g}" if r.bound else "")
        numbers = map(str, (r.block, r.warps, r.registers, r.spills, r.shared))
        rows.append((r.variant, r.dtype, r.target, *numbers, per_logit, ", ".join(r.wrong)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--sample", action="store_true", help="each form of a kernel once, with types and targets in turn")
    parser.add_argument("--dtype", choices=list(BYTES), help="default: all")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    found = [each for each in variants() if arguments.dtype in (None, each.dtype)]
    chosen = compilations(found, arguments.target or list(TARGETS), arguments.sample)
    chosen = [(variant, target) for variant, target in chosen if arguments.only in variant.name]
    results = [compile_variant(variant, target) for variant, target in chosen]
    print(f"triton {triton.__version__}\n{table(results)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
