"""The whole pipeline on two cores: corpus, tokenizer, training under two layouts, Hugging Face export, generation.

Run it with ``make demo``. Each step is one of the library's commands and is printed, so that you can repeat it by hand.
Results are in runs/quickstart/; a second run starts over.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from steel_megatron.report import plot_loss, read_scalars

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("runs/quickstart")
CORPUS = Path("examples/quickstart/corpus")
CONFIG = "examples/quickstart/pretrain.yaml"
STEPS = 250
PROMPTS = {"zh": "问：为什么", "python": "import os\n\ndef "}
NEW_TOKENS = 48
# The whole standard library would dwarf the corpus, so use only the small top-level modules.
LARGEST_MODULE = 16 * 1024

GENERATE_WITH_TRANSFORMERS = """
import json, sys, torch, transformers
folder, new_tokens, prompts = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.size(1):].tolist()
    if out and out[-1] == model.config.eos_token_id:
        out.pop()
    print(json.dumps(out))
"""


def main() -> int:
    os.chdir(ROOT)
    with locked() as free:
        if not free:
            return 2
        shutil.rmtree(RUN, ignore_errors=True)
        RUN.mkdir(parents=True)
        return demo(time.monotonic())


@contextmanager
def locked() -> Iterator[bool]:
    """Whether no other demo is running in this folder; none begins until this one ends."""
    RUN.parent.mkdir(exist_ok=True)
    with (RUN.parent / ".quickstart.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("error: another demo is running in this folder; wait until it ends", file=sys.stderr)
            yield False
            return
        yield True


def demo(started: float) -> int:
    title("1. Corpus: text written for this project, and small modules of Python's standard library")
    code = copy_standard_library(RUN / "code")
    inputs = [str(CORPUS), str(code)]
    title("2. Tokenizer: SentencePiece, 8,000 pieces")
    run("tools/train_tokenizer.py", "--input", *inputs, "--output", str(RUN / "tokenizer"), "--vocab-size", "8000")
    title("3. Preprocessing: an indexed corpus in Megatron's format, with a validation split by document")
    tokenizer = ["--tokenizer_kind", "sentencepiece", "--tokenizer_path", str(RUN / "tokenizer.model")]
    steel(
        *("preprocess", "--inputs", *inputs, "--output_prefix", str(RUN / "data/corpus"), *tokenizer),
        *("--valid_fraction", "0.1", "--workers", "2", "--report", str(RUN / "corpus.json")),
    )
    title("4. Pretraining: tensor parallel 2, stopped halfway")
    pretrain("--training.stop_after_step", str(STEPS // 2))
    title("   the same run, resumed with pipeline parallel 2")
    pretrain("--parallel.tensor_model_parallel_size", "1", "--parallel.pipeline_model_parallel_size", "2")
    title("5. Export to a Hugging Face folder")
    checkpoint, exported = RUN / f"model/checkpoints/step_{STEPS:08d}", RUN / "hf"
    steel("export-hf", "--checkpoint", str(checkpoint), "--output", str(exported), *tokenizer)
    title("6. Generation: the exported folder through transformers, the checkpoint through the library")
    samples, same = generate(checkpoint, exported)
    if not same:
        print("error: transformers and the library generated different tokens", file=sys.stderr)
        return 1
    summary = summarize(checkpoint, exported, samples, time.monotonic() - started)
    show(summary)
    return 0


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def run(*words: str, capture: bool = False) -> str:
    """Run a Python program in this environment; if it fails, the demo fails."""
    shown = " ".join(word if len(word) < 80 and "\n" not in word else "..." for word in words)
    print(f"$ python {shown}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, check=False, stdout=subprocess.PIPE if capture else None, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def steel(*words: str, capture: bool = False) -> str:
    return run("-m", "steel_megatron", *words, capture=capture)


def torchrun(*words: str) -> None:
    """One of the library's commands on two processes."""
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "steel_megatron", *words)


def pretrain(*overrides: str) -> None:
    torchrun("pretrain", "--config", CONFIG, "--training.train_steps", str(STEPS), *overrides)


def copy_standard_library(folder: Path) -> Path:
    """Copy the top-level standard library modules of up to 16 KiB."""
    folder.mkdir()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for module in modules:
        if 0 < module.stat().st_size <= LARGEST_MODULE:
            shutil.copyfile(module, folder / module.name)
    count = len(list(folder.iterdir()))
    print(f"{count} modules of Python {sys.version.split()[0]}; texts in {CORPUS}")
    return folder


def generate(checkpoint: Path, exported: Path) -> tuple[list[dict[str, str]], bool]:
    """Samples, and whether both implementations give the same greedy tokens."""
    prompts = list(PROMPTS.values())
    words = ("--max_new_tokens", str(NEW_TOKENS), "--json_output", "true", "--prompts", *prompts)
    lines = run("-c", GENERATE_WITH_TRANSFORMERS, str(exported), str(NEW_TOKENS), *prompts, capture=True).splitlines()
    theirs = [json.loads(line) for line in lines]
    lines = steel("generate", "--model", str(checkpoint), *words, capture=True).splitlines()
    ours = [json.loads(line)["new_tokens"] for line in lines]
    # A model this small repeats itself under greedy decoding, so show sampled text.
    drawn = ("--temperature", "0.8", "--top_k", "40")
    lines = steel("generate", "--model", str(checkpoint), *drawn, *words, capture=True).splitlines()
    results = [json.loads(line) for line in lines]
    samples = [
        {"language": language, "prompt": one["prompt"], "text": one["text"]}
        for language, one in zip(PROMPTS, results, strict=True)
    ]
    return samples, ours == theirs


def layout_of(checkpoint: Path) -> str:
    return json.loads((checkpoint / "steel.json").read_text())["layout"]


def summarize(checkpoint: Path, exported: Path, samples: list[dict[str, str]], seconds: float) -> dict[str, Any]:
    corpus = json.loads((RUN / "corpus.json").read_text())
    scalars = read_scalars(RUN / "model/tensorboard")
    picture = RUN / "loss.png"
    entropy = corpus["unigram_entropy"]
    plot_loss(scalars, picture, unigram_entropy=entropy, title="Quickstart: 4 layers, merged Soft-MoE")
    with safe_open(exported / "model.safetensors", framework="numpy") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 (not a dictionary)
    parameters = 0
    for shape in sizes:
        count = 1
        for side in shape:
            count *= side
        parameters += count
    summary = {
        "documents": corpus["documents"],
        "tokens": corpus["tokens"],
        "parameters": parameters,
        "layouts": [layout_of(path) for path in sorted(checkpoint.parent.glob("step_*"))],
        "loss_first": scalars["train/loss"][0][1],
        "loss_last": scalars["train/loss"][-1][1],
        "validation_loss": scalars["validation/loss"][-1][1],
        "unigram_entropy": entropy,
        "checkpoint_dir": str(checkpoint),
        "hf_dir": str(exported),
        "tensorboard_dir": str(RUN / "model/tensorboard"),
        "loss_curve_png": str(picture),
        "samples": samples,
        "seconds": round(seconds, 1),
    }
    (RUN / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return summary


def show(summary: dict[str, Any]) -> None:
    title("Summary (runs/quickstart/summary.json)")
    print(f"corpus       {summary['documents']:,} documents, {summary['tokens']:,} tokens")
    print(f"model        {summary['parameters']:,} parameters, trained as {' then '.join(summary['layouts'])}")
    print(f"loss         {summary['loss_first']:.3f} at the first step, {summary['loss_last']:.3f} at the last")
    print(
        f"validation   {summary['validation_loss']:.3f} nats per token; unigram entropy "
        f"{summary['unigram_entropy']:.3f}"
    )
    for label, name in (
        ("checkpoint", "checkpoint_dir"),
        ("HF folder", "hf_dir"),
        ("TensorBoard", "tensorboard_dir"),
        ("loss curve", "loss_curve_png"),
    ):
        print(f"{label:12} {summary[name]}")
    for sample in summary["samples"]:
        print(f"\n[{sample['language']}] {sample['text']}")
    print(f"\nboth implementations generated the same tokens; {summary['seconds']:.0f} seconds in all")


if __name__ == "__main__":
    sys.exit(main())
