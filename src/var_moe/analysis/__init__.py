"""Where a forward's time goes, how it scales, what bounds it, and what a cost model predicts."""

from var_moe.analysis.performance import PerformanceModel, TierDistribution
from var_moe.analysis.pipeline import profile_full_pipeline
from var_moe.analysis.profiler import GPUProfiler

__all__ = ["GPUProfiler", "PerformanceModel", "TierDistribution", "profile_full_pipeline"]
