"""For instructors: `classroom.hand_out` makes notebooks, `classroom.grade` grades them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "book" / "tools"))  # they know how the book's notebooks are built
