"""Peak memory of loading a checkpoint, as a multiple of its weights: no copy is made of what is already in the file.

    python benchmarks/loading.py                 # the 1.4B shape in bf16: 2.7 GiB of disk for a minute
    python benchmarks/loading.py --small         # 70M parameters

A checkpoint of random weights is written in shards, then a fresh process loads it with `load_model`, which also checks
that every weight is finite. What is reported is the most memory that was resident in that process (VmHWM, so Linux
only), whole and less what it held before loading, as multiples of the weights' bytes; and the same for loading it as
fp32, where a copy of twice the size cannot be avoided.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Write the checkpoint, load it in fresh processes, print the multiples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="70M parameters instead of 1.4B")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        measure(*options.load)
        return
    print(f"{'weights':>16}{'loaded as':>12}{'peak, whole process':>22}{'peak, less the start':>22}")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), options.small)
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, __file__, "--load", folder, dtype]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def write_checkpoint(folder: Path, small: bool) -> None:
    """A random bf16 model of the shape of Ouro 1.4B (or narrower), in four shards, with a tokenizer."""
    import torch

    from looplm import OuroConfig, OuroForCausalLM
    from looplm.data.tokenizers import train_bpe

    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    config = OuroConfig(**sizes if small else {}, head_dim=128)
    with torch.device("meta"):
        model = OuroForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 4)
    train_bpe(["a tokenizer of its own"], 259).save_pretrained(folder)


def measure(folder: str, dtype: str) -> None:
    """Load in this process and print one row."""
    import torch

    from looplm.model.loading import load_model

    before = _resident("VmRSS")
    model, _ = load_model(folder, getattr(torch, dtype))
    size = sum(Path(file).stat().st_size for file in Path(folder).glob("*.safetensors"))
    peak = _resident("VmHWM")
    parameters = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}M in bf16"
    print(f"{parameters:>16}{dtype:>12}{peak / size:>21.2f}x{(peak - before) / size:>21.2f}x")


def _resident(field: str) -> int:
    """Bytes, from the kernel's status file of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: this benchmark runs on Linux only")
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
