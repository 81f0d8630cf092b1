"""All checks of an edition. Adding one is a function over the survey, and a line in its list."""

from octavo.inspection import agreement_checks, scale_checks, weight_checks

CHECKS = (*agreement_checks.CHECKS, *scale_checks.CHECKS, *weight_checks.CHECKS)
