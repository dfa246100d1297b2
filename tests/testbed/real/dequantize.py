"""Writes the float32 model and the tokenizer of a GGUF file as a Hugging Face folder.

    PYTHONPATH=build/real/tools python tests/testbed/real/dequantize.py FILE.gguf OUT

Run by parts.py with the packages of tools.txt on the path.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> None:
    """Command line: the file and the folder."""
    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
