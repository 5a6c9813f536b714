"""What the fork server imports: all that a trial needs. Only that server imports this."""

# First, since the imports take seconds, in which signals come as well.
import gla_ablate.launch.server_signals

# isort: split
import tensorboard.compat  # noqa: F401 (so that trials have it)

import gla_ablate.fit
import gla_ablate.trial  # noqa: F401 (so that trials have it)
