"""A procedural planet whose every pixel is known.

Everything is a pure function of the seed, the place in metres of EPSG:32633 and the date: random numbers are hashes of
places, so a window shows what a larger one shows there, bit for bit at the same pixel size on the same machine.
"""

from panterra.planet.ground import CRS, Ground
from panterra.planet.planet import Planet
from panterra.planet.scenes import write_planet_scene
from panterra.planet.sensors import SENSORS, Optics, Radar
from panterra.planet.surfaces import CLASSES, SOUTHERN_CLASSES, SURFACES, Class, Surface

__all__ = [
    "CLASSES",
    "CRS",
    "SENSORS",
    "SOUTHERN_CLASSES",
    "SURFACES",
    "Class",
    "Ground",
    "Optics",
    "Planet",
    "Radar",
    "Surface",
    "write_planet_scene",
]
