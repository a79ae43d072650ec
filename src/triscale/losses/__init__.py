"""Contrastive losses as modules that own their temperature; each in a dense and a tiled form with equal results."""

from triscale.losses.info_nce import InfoNCE

__all__ = ["InfoNCE"]
