"""``python -m steel_megatron``: the command line, in a form that torchrun and srun can start."""

import sys

from steel_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
