"""A row's reduction in one pass over it, in the code that inductor makes for a GPU.

Inductor holds a row of up to 1,024 numbers and reads it once, unless something that it reads with the row is broadcast:
then it reads the row twice, and computes twice what is made of it. So it does in attention's softmax, whose heads have
one mask: with the soft-cap's tanh twice it took 135 us a layer, where one pass takes 54 (benchmarks/LOG.md).
That is torch 2.11; 2.13 takes one pass by itself. This file can go once 2.13 is the oldest that is supported.
"""

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.runtime.hints import ReductionHint

LONGEST = 1024  # inductor's own, for rows read with nothing that is broadcast


class OnePass(InductorChoices):
    """For `torch._inductor.config.inductor_choices_class`, which is there for heuristics: none changes a result."""

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        is_broadcast = features.get_reduction_hint() == ReductionHint.DEFAULT
        length = features.reduction_numel
        if is_broadcast and not cooperative_reduction and length.is_Integer and length <= LONGEST:
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def uuid(self) -> str:
        """Of these choices, for inductor's cache on disk."""
        return f"{type(self).__module__} {LONGEST}"
