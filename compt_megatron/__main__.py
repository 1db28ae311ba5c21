"""`python -m compt_megatron`: the `compt` command, also for torchrun and deepspeed."""

import sys

from compt_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
