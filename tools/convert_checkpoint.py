"""Convert between checkpoints and Hugging Face folders.

Examples:
    python tools/convert_checkpoint.py --direction to-hf --load run/checkpoints/step_00001000 --save exported \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --dtype bfloat16
    python tools/convert_checkpoint.py --direction from-hf --load downloaded --save imported
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steel_megatron.config import MEGATRON_TOKENIZER_TYPES
from steel_megatron.hf.convert import DTYPES, export_hf, import_hf
from steel_megatron.log import exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", choices=("to-hf", "from-hf"), required=True)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint (step_...) or Hugging Face folder to read")
    parser.add_argument("--save", type=Path, required=True, help="output folder; it appears only when it is complete")
    parser.add_argument(
        "--tokenizer-type",
        choices=sorted(MEGATRON_TOKENIZER_TYPES),
        help="to-hf: type of the tokenizer to export with the model",
    )
    parser.add_argument("--tokenizer-model", help="to-hf: tokenizer folder or .model file")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="to-hf: dtype of the weights; default: as saved")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    arguments = parser.parse_args()
    if (arguments.tokenizer_type is None) != (arguments.tokenizer_model is None):
        parser.error("--tokenizer-type and --tokenizer-model must be given together")
    if arguments.direction == "from-hf" and (arguments.tokenizer_type or arguments.dtype):
        parser.error("--tokenizer-type, --tokenizer-model and --dtype require --direction to-hf")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    kind = arguments.tokenizer_type
    tokenizer = (MEGATRON_TOKENIZER_TYPES[kind], arguments.tokenizer_model) if kind else None
    if arguments.direction == "to-hf":
        export_hf(arguments.load, arguments.save, tokenizer, arguments.dtype, overwrite=arguments.overwrite)
    else:
        import_hf(arguments.load, arguments.save, overwrite=arguments.overwrite)


if __name__ == "__main__":
    sys.exit(exit_code(main))
