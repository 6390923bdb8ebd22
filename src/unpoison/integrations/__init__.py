"""Other people's tools: experiment trackers, training frameworks, and the conventions of scikit-learn.

`unpoison.integrations.huggingface` and `unpoison.integrations.lightning` import those frameworks, so they are
imported by name. Nothing here computes: it translates.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
