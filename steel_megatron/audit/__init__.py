"""The causality audit of a model on disk: a checkpoint, a Hugging Face folder, or settings alone."""

from steel_megatron.audit.report import AuditReport, Difference, ExportedAudit
from steel_megatron.audit.run import audit

__all__ = ["AuditReport", "Difference", "ExportedAudit", "audit"]
