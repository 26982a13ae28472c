"""Seeds: every random number of a run comes from a seed derived here, never from a global generator.

A seed is derived from its purpose, so no random state needs saving. The same (seed, purpose, step, agent,
...) gives the same numbers in every mode, on every process, and on recomputation.
"""

import hashlib


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for one purpose: equal inputs give equal seeds, different inputs give unrelated ones.

    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3)
    True
    """
    digest = hashlib.blake2b(repr((seed, *labels)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch.Generator takes a signed 64-bit seed
