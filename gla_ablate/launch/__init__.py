"""Where trials run: each a process of its own, `python -m gla_ablate.trial RUN_FOLDER`, that reports through files."""
