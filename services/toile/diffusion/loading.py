"""Networks are made one at a time, whatever they are for."""

import threading

MAKING = threading.RLock()
"""Held while a network is made: `from_pretrained` of diffusers and transformers patches torch for
the whole process meanwhile, so that what another thread makes would stay without weights."""
