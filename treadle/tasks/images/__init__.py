"""Images as inputs of models: reading image files, patches, tiles, and prompts with images (docs/vision.md)."""
