"""``python -m dmd_tutorial`` is ``dmd``; `accelerate launch -m dmd_tutorial ...` starts several."""

import sys

from dmd_tutorial.runs.cli import main

sys.exit(main())
