"""The toy tasks can be named as a user names his own: "toy_tasks:Mortal"."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
