"""Imagery: files on a grid (`raster`), scenes (`stac`), people's own rasters (`files`), checks (`doctor`), `labels`."""
