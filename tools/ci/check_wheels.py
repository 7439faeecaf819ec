"""Installs each artifact of a release into a fresh environment and runs it there.

    python tools/ci/check_wheels.py dist/* [--torch TORCH_SITE_PACKAGES] [--limit 20]

Wheels are installed and run without a compiler on PATH; a source distribution with one. Checked: the seconds that the installation takes
beyond torch, which backend computes, a loss and its gradient, and `grpo-fast doctor`. Without --torch, the newest torch is installed from
the package index that pip is set up with; with it, that folder's torch is used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = """
import json, warnings, torch, grpo_fast as gf
warnings.simplefilter("ignore")
torch.manual_seed(0)
logits, ids, advantages = torch.randn(2, 3, 50, requires_grad=True), torch.randint(50, (2, 3)), torch.tensor([1.0, -1.0])
loss = gf.grpo_loss(logits, ids, advantages, old_logprobs=torch.full((2, 3), -4.0)).loss
loss.backward()
ratio = (logits.detach().double().requires_grad_())
lp = ratio.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
r = (lp + 4.0).exp()
truth = -torch.minimum(r * advantages[:, None], r.clamp(0.8, 1.2) * advantages[:, None]).mean()
(grad,) = torch.autograd.grad(truth, ratio)
print(json.dumps({
    "version": gf.__version__, "torch": torch.__version__, "cpu": gf.backends()["cpu"].usable,
    "loss_error": abs(loss.item() - truth.item()), "gradient_error": (logits.grad.double() - grad).abs().max().item(),
}))
"""


def check(artifact: Path, torch_site: Path | None, limit: float) -> dict[str, object]:
    """Install and run one artifact.

    Raises:
        SystemExit: what is wrong with it.
    """
    source, pure = artifact.name.endswith(".tar.gz"), artifact.name.endswith("-none-any.whl")
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "venv", folder], os.environ["PATH"])
        bin_folder = str(Path(folder, "bin"))
        path = os.pathsep.join([bin_folder, os.environ["PATH"]]) if source else bin_folder
        python = str(Path(bin_folder, "python"))
        if torch_site:
            site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], path).strip()
            Path(site, "torch.pth").write_text(f"{torch_site}\n")
        else:
            install_torch(python, path)
        begin = time.perf_counter()
        run([python, "-m", "pip", "install", "-q", "--no-compile", str(artifact.resolve())], path)
        seconds = time.perf_counter() - begin
        found: dict[str, object] = json.loads(run([python, "-c", CODE], path, folder))
        doctor = run([str(Path(bin_folder, "grpo-fast")), "doctor"], path, folder)
    problems = []
    if "backends" not in doctor:
        problems.append("`grpo-fast doctor` printed no table of backends")
    if found["cpu"] is pure:
        problems.append(f"the C++ backend is {'usable' if found['cpu'] else 'not usable'}")
    if not (float(str(found["loss_error"])) < 1e-6 and float(str(found["gradient_error"])) < 1e-6):
        problems.append(f"loss or gradient are wrong: {found}")
    if not source and seconds > limit:
        problems.append(f"the installation took {seconds:.1f} s beyond torch, expected at most {limit:.0f} s")
    if problems:
        raise SystemExit(f"{artifact.name}: {'; '.join(problems)}")
    return {"artifact": artifact.name, "seconds": round(seconds, 1), **found}


def install_torch(python: str, path: str) -> None:
    """The newest torch; with UV_TORCH_BACKEND (as "cpu"), by uv, which must be on PATH, and then of that kind."""
    if os.environ.get("UV_TORCH_BACKEND"):
        run(["uv", "pip", "install", "-q", "--python", python, "torch>=2.11"], os.environ["PATH"])
    else:
        run([python, "-m", "pip", "install", "-q", "--no-compile", "torch>=2.11"], path)


def run(command: list[str], path: str, folder: str | None = None) -> str:
    unwanted = ("PYTHONPATH", "CXX", "CC", "VIRTUAL_ENV", "GRPO_FAST_BUILD")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted} | {"PATH": path}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:5])} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--torch", type=Path, help="site-packages of an installed torch to use")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that the installation of a wheel may take beyond torch")
    arguments = parser.parse_args()
    for artifact in arguments.artifacts:
        print(json.dumps(check(artifact, arguments.torch, arguments.limit)))


if __name__ == "__main__":
    main()
