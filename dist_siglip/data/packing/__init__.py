"""Pictures and captions of a table or a folder, written as webdataset shards."""

from dist_siglip.data.packing.pack import PackReport, PackSettings, pack

__all__ = ["PackReport", "PackSettings", "pack"]
