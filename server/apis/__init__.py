"""The APIs: one module for each, and what they share in `base`, `request` and `image_options`."""
