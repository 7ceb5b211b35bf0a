"""Train and fine-tune SigLIP-style dual encoders, and tell whether their space is any good.

The names below are the public ones most work begins with; each is imported, with torch, when it is
first used. Further public names are those in the ``__all__`` of a package.
"""

from typing import TYPE_CHECKING

from dist_siglip.system.moved import install as _keep_old_paths

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "DualEncoder",
    "EmbedSettings",
    "ImageTextDataModule",
    "LogitConfig",
    "LogitScaleBias",
    "OptimConfig",
    "PairEvaluation",
    "SigLipLoss",
    "SigLipModule",
    "UserError",
    "build_dual_encoder",
    "build_optimizer",
    "embed_shards",
    "evaluate_pairs",
    "export_model",
    "linear_separability",
    "load_trained",
    "modality_gap",
    "recall_at_k",
    "retrieval_ranks",
    "siglip_loss",
    "softmax_loss",
    "uniformity",
    "write_report",
]

_keep_old_paths()

# For those who read the code and do not run it: editors, mypy, the reference.
if TYPE_CHECKING:
    from dist_siglip.errors import UserError
    from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
    from dist_siglip.losses import (
        ClipLoss,
        LogitConfig,
        LogitScaleBias,
        SigLipLoss,
        siglip_loss,
        softmax_loss,
    )
    from dist_siglip.metrics import (
        PairEvaluation,
        evaluate_pairs,
        linear_separability,
        modality_gap,
        recall_at_k,
        retrieval_ranks,
        uniformity,
    )
    from dist_siglip.models import DualEncoder, build_dual_encoder
    from dist_siglip.models.interop.export import export_model
    from dist_siglip.report import write_report
    from dist_siglip.training.datamodule import ImageTextDataModule
    from dist_siglip.training.module import SigLipModule, load_trained
    from dist_siglip.training.optim import OptimConfig, build_optimizer
else:
    _PACKAGES = {
        "dist_siglip.training.datamodule": ("ImageTextDataModule",),
        "dist_siglip.evaluation.embed": ("EmbedSettings", "embed_shards"),
        "dist_siglip.errors": ("UserError",),
        "dist_siglip.losses": (
            "ClipLoss",
            "LogitConfig",
            "LogitScaleBias",
            "SigLipLoss",
            "siglip_loss",
            "softmax_loss",
        ),
        "dist_siglip.metrics": (
            "PairEvaluation",
            "evaluate_pairs",
            "linear_separability",
            "modality_gap",
            "recall_at_k",
            "retrieval_ranks",
            "uniformity",
        ),
        "dist_siglip.models": ("DualEncoder", "build_dual_encoder"),
        "dist_siglip.models.interop.export": ("export_model",),
        "dist_siglip.training.module": ("SigLipModule", "load_trained"),
        "dist_siglip.training.optim": ("OptimConfig", "build_optimizer"),
        "dist_siglip.report": ("write_report",),
    }
    _PACKAGE_OF = {name: package for package, names in _PACKAGES.items() for name in names}

    def __getattr__(name: str) -> object:
        """Import a public name at its first use."""
        if name not in _PACKAGE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_PACKAGE_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """List the public names before they are imported, too."""
        return sorted({*globals(), *__all__})
