"""Trained models in the forms of other libraries."""

from dist_siglip.models.export.model import Exported, Form, export_model

__all__ = ["Exported", "Form", "export_model"]
