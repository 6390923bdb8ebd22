"""Find, remove and withstand poison in training data.

    import unpoison
    findings = unpoison.trace(model, training_set, unpoison.Observation(image, predicted=5))
    healed = unpoison.heal(model, training_set, findings)

The verbs are those of `unpoison.workflow`; the methods are in the packages `unpoison.attacks`,
`unpoison.defenses`, `unpoison.detectors`, `unpoison.input_detectors` and `unpoison.unlearners`. Names are
imported when they are first used, so `import unpoison` costs nothing.
"""

import lazy_loader as _lazy

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
