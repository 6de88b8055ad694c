"""Makes the fixtures of harness.py known to the tests in this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import here  # noqa: E402, F401
