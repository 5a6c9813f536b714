"""What the fork server imports: all that a trial needs. Only that server imports this.

A SIGTERM to a whole process group is for the trials, which save and end; were the server to end by it, run.py would
take them for lost while they do.
"""

import signal

import tensorboard.compat  # noqa: F401

import gla_ablate.fit
import gla_ablate.trial  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
