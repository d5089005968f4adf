"""Both training stages: the backbone from images, the NFormer head from features."""
