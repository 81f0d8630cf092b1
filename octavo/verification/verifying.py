"""``octavo.verify``: an edition alone, against its original, and in an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo.engines import check_engine
from octavo.engines.vllm_loaded import LoadedModel
from octavo.inspection import (
    Comparison,
    Finding,
    Inspection,
    OnProgress,
    Severity,
    by_severity,
    compare,
    describe,
    open_edition,
    run_checks,
    silent,
)
from octavo.verification.engine_checks import CHECKS
from octavo.verification.running import Scores, run_engine


@dataclass(frozen=True)
class Verification:
    """What verifying a checkpoint found out.

    Attributes:
        inspection: of the checkpoint alone.
        comparison: with the reference; None without one.
        scores: of the engine; None without one, or if it refused the checkpoint.
        loaded: what the engine vllm took of the checkpoint; None without it.
        findings: all of them, errors first.
    """

    inspection: Inspection
    comparison: Comparison | None
    scores: Scores | None
    loaded: LoadedModel | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.severity is not Severity.error for finding in self.findings)


def verify(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    engine: str | None = None,
    config: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> Verification:
    """Check a checkpoint, alone, against its original, and in an engine.

    Args:
        model: a directory, or a hub id.
        reference: the unquantized checkpoint it was made from: every weight's SQNR is measured, and
            everything else has to have its bytes.
        engine: a key of :data:`octavo.engines.ENGINES` to load the checkpoint and score a short text.
        config: the original model's ``config.json``, where the checkpoint has none (a TensorRT-LLM
            checkpoint of another tool).
        on_progress: called with megabytes read.

    Raises:
        OctavoError: as :func:`octavo.inspect`; the reference is quantized; no such engine, or it is
            not installed. What is wrong with the checkpoint is a finding instead.
    """
    if engine is not None:
        check_engine(engine)
    comparison: Comparison | None = None
    findings: tuple[Finding, ...] = ()
    with open_edition(model, config) as edition:
        if reference is not None:
            # First, so that a wrong reference is told at once.
            with open_edition(reference) as original:
                comparison, findings = compare(edition, original, on_progress)
        inspection = describe(edition, on_progress)
        kv_scales = {
            name: edition.read_unchecked(name).reshape(-1)[0].item()
            for name in edition
            if name.endswith((".k_scale", ".v_scale"))
        }
    ran = None if engine is None else run_engine(engine, inspection, kv_scales, reference)
    if ran is not None:
        findings = (*findings, *run_checks(CHECKS, ran))
    return Verification(
        inspection=inspection,
        comparison=comparison,
        scores=ran and ran.scores,
        loaded=ran and ran.loaded,
        findings=by_severity((*inspection.findings, *findings)),
    )
