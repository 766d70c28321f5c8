"""python -m tritonnet."""

import sys

from .cli import main

sys.exit(main())
