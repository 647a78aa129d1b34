"""Attention blocks that come with se-inject, one file each, found through their entry points."""
