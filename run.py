"""Run an experiment: `python run.py experiments/quickstart.yaml`; `--help` lists what else there is."""

import sys

from gla_ablate.cli import main

if __name__ == "__main__":
    sys.exit(main())
