"""What `fuse` did to a model, as objects and as text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastlayers.fusion.install import fusion_of


@dataclass(frozen=True)
class FusedChain:
    """A chain that runs as one call.

    Attributes:
        module: the path of the module whose forward it is in; "" is the model itself.
        norm: the path of its BatchNorm.
        chain: its members, such as "bn2 → add → relu", by their paths from `module`.
        fallbacks: why calls ran members one by one; empty if all were fused.
        ends: which max-pool, or dropout or activation behind one, stays behind the chain, and why; "" if none does.
    """

    module: str
    norm: str
    chain: str
    fallbacks: tuple[str, ...] = ()
    ends: str = ""

    def __str__(self) -> str:
        place = f"{self.module or 'the model'}: {self.chain}"
        ends = (f"    ends before {self.ends}",) if self.ends else ()
        return "\n".join((place, *ends, *(f"    ran unfused: {reason}" for reason in self.fallbacks)))


@dataclass(frozen=True)
class NotFused:
    """A BatchNorm that starts no chain.

    Attributes:
        norm: its path.
        reason: why.
    """

    norm: str
    reason: str

    def __str__(self) -> str:
        return f"{self.norm or 'the model'}: {self.reason}"


@dataclass(frozen=True)
class FusionReport:
    """What was fused, what was not and why. ``print`` it, or read its attributes.

    Attributes:
        fused: the chains, in the order of ``named_modules()``.
        not_fused: every other BatchNorm.
    """

    fused: tuple[FusedChain, ...]
    not_fused: tuple[NotFused, ...]

    @property
    def fell_back(self) -> tuple[FusedChain, ...]:
        """The chains of which some call ran unfused."""
        return tuple(chain for chain in self.fused if chain.fallbacks)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} chains are fused, {len(self.not_fused)} BatchNorms are not."]
        for title, entries in (("Fused:", self.fused), ("Not fused:", self.not_fused)):
            if entries:
                lines += ["", title, *(f"  {line}" for entry in entries for line in str(entry).splitlines())]
        return "\n".join(lines)


def fusion_report(model: nn.Module) -> FusionReport:
    """What `fastlayers.fuse` did to `model`, and which chains have run unfused since.

    Args:
        model: one that was given to `fuse`, a part or a copy of it.

    Returns:
        The report as of now. It is empty for a model that was not fused.
    """
    fused: list[FusedChain] = []
    not_fused: list[NotFused] = []
    seen: set[int] = set()  # BatchNorms: a chain that goes beyond a submodule is in that one's forward, too
    for path, module in model.named_modules():
        fusion = fusion_of(module)
        if fusion is None:
            continue
        if fusion.reason is not None and id(module) not in seen:
            not_fused.append(NotFused(path, fusion.reason))
        covered: set[int] = set()
        for chain in fusion.chains:
            norm = _submodule(module, chain.norm)
            if norm is not None:
                if id(norm) in seen:
                    continue
                covered.add(id(norm))
            fallbacks = (*fusion.fallbacks, *chain.fallbacks)
            where = ".".join(filter(None, (path, chain.norm)))
            fused.append(FusedChain(path, where, str(chain), fallbacks, chain.ends))
        seen |= covered
    return FusionReport(tuple(fused), tuple(not_fused))


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:  # it was taken out since
        return None
