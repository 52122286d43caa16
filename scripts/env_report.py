"""Report what a measurement made here depends on: python scripts/env_report.py [--json]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.environment import main

if __name__ == "__main__":
    main()
