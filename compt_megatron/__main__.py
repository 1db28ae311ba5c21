"""`python -m compt_megatron`: the `compt` command, also for torchrun and deepspeed."""

from compt_megatron.cli import entry

if __name__ == "__main__":
    entry()
