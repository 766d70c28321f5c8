"""Train LeNet: the same as the command `tritonnet train`.

python -m tritonnet.train
torchrun --nproc-per-node 2 -m tritonnet.train
"""

import sys

from .cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
