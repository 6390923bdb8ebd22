"""Test-time detectors: is THIS input triggered? By name in `unpoison.input_detectors`."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
