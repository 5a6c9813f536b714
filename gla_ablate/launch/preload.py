"""What the fork server imports: all that a trial needs. Only that server imports this.

Signals to a whole process group are for run.py and the trials, which save and end; were the server to end by one,
run.py would take them for lost while they do. SIGTERM is held back rather than ignored, so that it isn't lost on a
trial that has only been forked (`processes.run`).
"""

# ruff: noqa: E402  # the imports take seconds, in which signals come as well
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

import tensorboard.compat  # noqa: F401

import gla_ablate.fit
import gla_ablate.trial  # noqa: F401
