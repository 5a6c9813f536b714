"""Models to and from other libraries: flash-linear-attention's checkpoints, lm-evaluation-harness's tasks.

    model = from_fla("their_folder")              to_fla(model, "folder_for_them")
    python -m gla_ablate.interop.harness run --model gla_ablate --model_args folder=RUN_FOLDER --tasks …

Neither library is needed for reading and writing weights.
"""

from gla_ablate.interop.fla import from_fla, to_fla

__all__ = ["from_fla", "to_fla"]
