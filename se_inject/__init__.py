from se_inject._version import __version__

__all__ = ["__version__"]
