"""transformers' tensor parallelism cuts exported models on two processes, with the logits of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steel_megatron.hf.modeling_steel import SteelForCausalLM
from tests.distributed import run_distributed
from tests.hf.test_consumers import MODES
from tests.hf.test_modeling import small_model, tokens


def cut(paths: list[Path], ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of each model: its logits, greedy tokens and how many numbers this process holds of the projections."""
    found = []
    for path in paths:
        model = SteelForCausalLM.from_pretrained(path, tp_plan="auto", tp_size=2)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
            text = model.generate(ids, max_new_tokens=3, do_sample=False)
        names = [(name, one) for name, one in model.named_parameters() if name.endswith("_proj.weight")]
        found.append((logits, text, sum(getattr(one, "_local_tensor", one).numel() for _, one in names)))
    return found


@pytest.mark.slow
def test_two_processes_share_a_model(tmp_path: Path) -> None:
    models = [small_model("merged", FFN_type="raw") if mode == "dense" else small_model(mode) for mode in MODES]
    paths = [tmp_path / mode for mode in MODES]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
    ids = tokens()
    for rank in run_distributed(cut, 2, paths, ids):
        for mode, model, (logits, text, held) in zip(MODES, models, rank, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
                assert text.equal(model.generate(ids, max_new_tokens=3, do_sample=False))
            projections = {name: one.numel() for name, one in model.named_parameters() if name.endswith("_proj.weight")}
            whole = sum(size for name, size in projections.items() if mode == "merged" and ".mlp.experts." in name)
            assert held == whole + (sum(projections.values()) - whole) // 2, mode
