"""MetaPoison: `algorithm` is Algorithm 1 of the paper, `attack` the options and the entry points.

`surrogates` is the ensemble, `look_ahead` the unrolled steps, `batch_norm` a faster second derivative for
them, `presets` the settings of the paper, and `checkpoints` says to which craft a checkpoint belongs.
"""

from unpoison.attacks.metapoison.attack import MetaPoison

__all__ = ["MetaPoison"]
