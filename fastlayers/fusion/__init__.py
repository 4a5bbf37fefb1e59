"""Fuses the chains BatchNorm → (add) → activation → (dropout) → (max-pool) of any model, in place, and undoes it."""

from fastlayers.fusion.chain import FusionWarning
from fastlayers.fusion.report import FusedChain, FusionReport, NotFused, fusion_report
from fastlayers.fusion.rewrite import fuse, unfuse

__all__ = ["FusedChain", "FusionReport", "FusionWarning", "NotFused", "fuse", "fusion_report", "unfuse"]
