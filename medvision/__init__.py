"""medvision finds rare, small lesions in medical scans. For research use only.

scan files -> Volume -> SliceStack -> detections -> Findings -> files a radiologist opens
label files -> Annotations -+ (train)                  +-> with Annotations -> errors -> report
"""

from medvision._version import __version__

__all__ = ["__version__"]
