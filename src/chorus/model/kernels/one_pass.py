"""A row's reduction in one pass over it, in the code that inductor makes for a GPU.

Inductor holds a row of up to 1,024 numbers and reads it once, but not where something is broadcast that it reads with
many rows: then it reads each row twice, and computes twice what is made of it. So it does in attention's softmax, whose
heads have one mask: with the soft-cap's tanh twice it took 135 us a layer, where one pass takes 54 (benchmarks/LOG.md).
"""

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.dependencies import MemoryDep
from torch._inductor.runtime.hints import ReductionHint

LONGEST = 1024  # inductor's own, for rows read with nothing that is broadcast


class OnePass(InductorChoices):
    """For `torch._inductor.config.inductor_choices_class`, which is there for heuristics: none changes a result."""

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        is_undecided = features.get_reduction_hint() == ReductionHint.DEFAULT and not cooperative_reduction
        length = features.reduction_numel
        if is_undecided and length.is_Integer and length <= LONGEST and _lie_in_rows(features):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def uuid(self) -> str:
        """Of these choices, for inductor's cache on disk."""
        return f"{type(self).__module__} {LONGEST}"


def _lie_in_rows(features: SIMDKernelFeatures) -> bool:
    """Whether what is reduced together lies together. Columns, held whole, would be read in pieces."""
    reads = (read for node in features.reduction_nodes() for read in node.read_writes.reads)
    return all(read.stride1_for_last_dim() for read in reads if isinstance(read, MemoryDep))
