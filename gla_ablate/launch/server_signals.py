"""What the fork server makes of signals, as soon as it has imported this. Only that server imports it.

Signals to a whole process group are for run.py and the trials, which save and end; were the server to end by one,
run.py would take them for lost while they do. SIGTERM is held back rather than ignored, so that it isn't lost on a
trial that has only been forked (`processes.run`).
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
