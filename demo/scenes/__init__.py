"""Synthetic images: generated scenes, their drawings and their patch labels."""
