"""A light, textured mesh of a trained scene: decimation, atlas, textures, files, the page that turns it."""
