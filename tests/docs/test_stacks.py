"""docs/stacks.md: each section's code runs after the page's first block, with the real library, and prints what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fam_ext

os.environ.setdefault("KERAS_BACKEND", "torch")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/stacks.md"
PACKAGES = ("accelerate", "transformers", "trl", "datasets", "peft", "lightning", "skorch", "fastai", "keras")
DISTRIBUTED = "<!-- torchrun -->\n\n"


def sections() -> dict[str, list[tuple[bool, str]]]:
    """Heading -> (whether torchrun starts it, code) of its blocks; those before the first heading are under ""."""
    found: dict[str, list[tuple[bool, str]]] = {}
    for part in re.split(r"^## ", "\n" + PAGE.read_text(), flags=re.MULTILINE):
        heading = part.partition("\n")[0]
        blocks = re.findall(rf"({DISTRIBUTED})?^```python\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
        found[heading] = [(bool(mark), code) for mark, code in blocks]
    return found


SECTIONS = sections()
(START,) = (code for _, code in SECTIONS[""])
HERE = [name for name, blocks in SECTIONS.items() if name and blocks and not any(mark for mark, _ in blocks)]
# what a section uses of an earlier one
AFTER = {"TRL": ["transformers' Trainer"]}


def code_of(heading: str) -> str:
    before = [code_of(name) for name in AFTER.get(heading, [])]
    return "\n".join([*before, *(code for _, code in SECTIONS[heading])])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("heading", HERE)
def test_code_runs(heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = code_of(heading)
    for package in PACKAGES:
        if re.search(rf"^(import|from) {package}\b", code, re.MULTILINE):
            if package == "fastai" and importlib.util.find_spec("fastai") is not None:
                pytest.importorskip("fastai.learner", reason="fastai lacks what it imports")
            pytest.importorskip(package, reason=f"{package} is not installed")
    state = torch.random.get_rng_state()
    names: dict[str, object] = {"__name__": "page"}
    try:
        exec(compile(START, f"{PAGE.name}: start", "exec"), names)
        exec(compile(code, f"{PAGE.name}: {heading}", "exec"), names)
    finally:
        torch.random.set_rng_state(state)
    criterion = names["criterion"]
    assert isinstance(criterion, fam_ext.FAMLoss)
    flatness = criterion.last.flatness
    assert flatness is None or bool(flatness > 0)
    criterion.detach()
    said = capsys.readouterr().out
    assert "nan" not in said
    lines = iter(said.splitlines())
    for value in re.findall(r"^print\(criterion\.step\)  # (\d+)", code, re.MULTILINE):
        assert value in lines, said  # in this order


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_code_of_several_processes(tmp_path: Path) -> None:
    """Two ranks, and after every block the gradient of one process with the whole batch."""
    parts = [START]
    for heading, blocks in SECTIONS.items():
        for mark, code in blocks:
            if mark:
                parts += [code, f"check({heading!r}, net, criterion)"]
    check = """
        import pathlib
        FOLDER = pathlib.Path(__file__).parent
        def full(t):
            return t.full_tensor() if hasattr(t, "full_tensor") else t
        def check(heading, net, criterion):
            alone = plain(net)
            index = len(alone) - 1
            whole = fam_ext.FAMLoss(ce, layer=alone[index], strength=0.01)
            whole(alone(x), y).backward()
            for p, q in zip(net.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-5, atol=1e-7)
            assert criterion.plan.method == "closed_form"
            (FOLDER / f"{heading} {dist.get_rank()}").touch()
        def plain(net):
            sizes = [tuple(full(p).shape) for p in net.parameters()]
            layers = []
            for out, fan_in in (s for s in sizes if len(s) == 2):
                layers += [torch.nn.Linear(fan_in, out), torch.nn.Tanh()]
            alone = torch.nn.Sequential(*layers[:-1])
            with torch.no_grad():
                for p, q in zip(net.parameters(), alone.parameters(), strict=True):
                    q.copy_(full(p))
            return alone
    """
    script = tmp_path / "page.py"
    script.write_text("\n".join([textwrap.dedent(check), *parts, "dist.destroy_process_group()"]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for heading in ("DDP", "FSDP2", "Tensor parallelism"):
        assert all((tmp_path / f"{heading} {rank}").exists() for rank in range(2))
