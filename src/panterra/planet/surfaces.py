"""What covers the planet, as tables: classes, spectra, and the surfaces with their years."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Tint: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """One kind of land cover in the truth."""

    name: str
    code: int
    colour: Tint
    worldcover: int
    """The code of ESA WorldCover that contains it."""


CLASSES = (
    Class(name="water", code=1, colour=(54, 112, 178), worldcover=80),
    Class(name="broadleaf forest", code=2, colour=(88, 150, 62), worldcover=10),
    Class(name="conifer forest", code=3, colour=(26, 92, 60), worldcover=10),
    Class(name="grassland", code=4, colour=(172, 212, 106), worldcover=30),
    Class(name="wetland", code=5, colour=(104, 186, 170), worldcover=90),
    Class(name="winter wheat", code=6, colour=(228, 190, 88), worldcover=40),
    Class(name="rapeseed", code=7, colour=(246, 232, 48), worldcover=40),
    Class(name="maize", code=8, colour=(236, 138, 40), worldcover=40),
    Class(name="alfalfa", code=9, colour=(98, 55, 111), worldcover=40),
    Class(name="built-up", code=10, colour=(215, 29, 12), worldcover=50),
    Class(name="bare ground", code=11, colour=(156, 142, 128), worldcover=60),
)
SOUTHERN_CLASSES = (
    Class(name="orchards and vineyards", code=12, colour=(206, 120, 108), worldcover=40),
    Class(name="shrubland", code=13, colour=(168, 158, 84), worldcover=20),
)
"""Only where a planet has a south."""

# Reflectance in percent at these wavelengths (micrometres), set by hand to the shapes and levels of such surfaces
# in spectral libraries and in satellite images. A band takes the value at its centre.
WAVELENGTHS = (0.44, 0.49, 0.56, 0.61, 0.665, 0.705, 0.74, 0.783, 0.84, 0.945, 1.24, 1.375, 1.61, 2.2)
SPECTRA: dict[str, tuple[float, ...]] = {
    "crop": (2.2, 2.8, 6.5, 5, 3.2, 11, 34, 44, 47, 46, 43, 12, 24, 11),
    "grass": (2.8, 3.6, 7.5, 6.5, 5, 12, 29, 36, 39, 39, 38, 14, 26, 14),
    "broadleaf": (1.6, 2.0, 4.9, 3.5, 2.3, 8.5, 28, 36, 39, 38, 36, 10, 19, 8.5),
    "conifer": (1.3, 1.6, 3.0, 2.4, 1.8, 5, 15, 19.5, 21, 20, 17, 5, 9.5, 4),
    "reed": (3, 3.6, 6, 6, 5.5, 10, 20, 24, 26, 25, 23, 8, 15, 8),
    "evergreen": (2.2, 2.7, 4.6, 4.3, 4.0, 7.8, 17, 21, 23.5, 23, 22, 8, 15.5, 7.5),
    "straw": (7, 9.5, 14, 18, 21.5, 25, 27.5, 29.5, 32, 34, 42, 32, 40, 29),
    "autumn": (3, 3.8, 6.5, 11, 13, 17, 24, 28, 31, 31, 34, 18, 26, 15),
    "blossom": (2.6, 3.8, 15.5, 16.5, 14.5, 21, 38, 46, 50, 49, 44, 13, 25, 12),
    "loam": (5.8, 7.8, 10.5, 12.2, 13.6, 15.5, 17.6, 19, 21, 23.5, 29, 26, 33, 29),
    "pale soil": (8.5, 11.5, 15.5, 18.5, 21, 23, 25, 26.5, 28.5, 31, 37, 34, 41, 36),
    "grass floor": (3.2, 4.2, 7.6, 7.4, 7, 12, 24, 29, 31.5, 32, 33, 15, 26, 16),
    "litter": (2, 2.6, 4.2, 4.9, 5.4, 7.8, 11.5, 13, 14.5, 16, 21, 14, 20, 14),
    "clear water": (4, 3.6, 2.8, 1.8, 1.3, 1, 0.8, 0.7, 0.6, 0.5, 0.3, 0.2, 0.2, 0.1),
    "turbid water": (5.5, 6.8, 9, 8.5, 7.5, 6, 3.5, 3, 2.5, 1.5, 0.6, 0.4, 0.5, 0.3),
    "asphalt": (8.3, 8.9, 9.6, 10, 10.3, 10.6, 11, 11.6, 12, 12.5, 14, 14, 15.5, 15),
    "gravel": (9.5, 11.5, 13.8, 15, 16, 17, 19, 20, 21, 22, 27, 26, 30, 28),
    "tile": (5.2, 5.8, 7.4, 10.6, 13.8, 15.4, 16.6, 18, 20, 22, 28, 28, 32, 30),
    "slate": (8.4, 8.8, 9.2, 9.4, 9.6, 9.8, 10, 10.5, 11, 12, 14, 14, 15, 15),
    "metal": (18, 19.5, 20.5, 21, 21.3, 21.6, 22, 22.3, 22.7, 23, 25, 25, 25, 24),
    "rock": (10.5, 12, 14.2, 15.8, 17, 18, 19, 20, 21, 22, 26, 25, 29, 28),
    "cloud": (72, 73, 73, 73, 73, 73, 73, 73, 73, 70, 66, 64, 52, 40),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """What covers the ground somewhere: its year, its colours, its echo."""

    code: int
    """The class it belongs to."""
    ground: str = "loam"
    """Spectrum below the plants."""
    green: str = "crop"
    bloom: str = "blossom"
    years: tuple[str, ...] = ("1:0",)
    """Calendars, of which each stand follows one: knots "day of year:green+dry+blooming", the shares of the ground in
    percent; straight lines between them, the year being a circle."""
    mixed: str = ""
    """A cover that grows among it, up to half of a stand."""
    spread: float = 1.0
    """How much stands differ from each other in time; 1 is about ten days either way."""
    variety: float = 1.0
    """How much stands differ from each other in brightness and hue."""
    texture: float = 0.03
    """Contrast between neighbouring pixels of 10 m."""
    heat: float = 0.0
    """Kelvin above grass at noon in summer."""
    c_bare: tuple[float, float] = (-12.0, -20.0)
    """C-band backscatter in dB, co- and cross-polarised, without plants."""
    c_full: tuple[float, float] = (-11.5, -18.0)
    """The same under a closed canopy."""
    l_bare: tuple[float, float] = (-16.5, -27.0)
    l_full: tuple[float, float] = (-14.0, -22.5)


# fmt: off
SURFACES: dict[str, Surface] = {
    "water": Surface(
        code=1, ground="clear water", green="turbid water", spread=2.5, variety=0.5, texture=0.015, heat=-4,
        c_bare=(-20.5, -27.5), c_full=(-20, -27), l_bare=(-24, -34), l_full=(-24, -34),
        years=(
            "1:55 110:75 250:40",
        ),
    ),
    "broadleaf": Surface(
        code=2, ground="litter", green="broadleaf", bloom="autumn", mixed="needles", spread=0.7, texture=0.11,
        heat=-3, c_bare=(-9.6, -15.8), c_full=(-8.9, -14.2), l_bare=(-8, -13), l_full=(-7.5, -12.4),
        years=(
            "1:10+8 95:14+6 112:60 130:97 210:92 262:85+0+5 286:35+0+55 308:12+8+25 330:10+10",
            "1:14+6 102:16+6 119:60 138:95 210:90 270:85+0+5 296:40+0+50 318:14+6+20 335:14+8",
        ),
    ),
    "conifer": Surface(
        code=3, ground="litter", green="conifer", mixed="tree", texture=0.1, heat=-3, c_bare=(-9.6, -15.4),
        c_full=(-9.3, -14.9), l_bare=(-8.2, -13.2), l_full=(-7.8, -12.8),
        years=(
            "1:84 150:93 200:97 300:86",
            "1:70+3 150:80 200:88 300:74+3",
        ),
    ),
    "grassland": Surface(
        code=4, green="grass", mixed="ley", spread=1.4, variety=1.2, c_full=(-11.6, -18.6),
        years=(
            "1:55+25 75:60+20 125:90 148:95+2 152:50+30 180:85+5 200:88+8 204:50+35 240:80+10 300:72+15 340:60+25",
            "1:50+30 80:55+25 130:80+5 180:66+20 220:52+35 270:65+20 320:60+25",
            "1:45+15 80:50+10 112:85 132:93 136:40+20 160:85 176:90 180:40+20 206:80+5 222:85+5 226:40+20 "
            "262:80+5 320:60+10",
            "1:35+50 90:40+45 140:80+12 172:75+20 205:50+42 212:35+45 260:60+25 310:50+40",
        ),
    ),
    "wetland": Surface(
        code=5, ground="turbid water", green="reed", mixed="margin", spread=1.2, variety=1.4, texture=0.07, heat=-3,
        c_full=(-9.2, -16.2), l_bare=(-13, -24), l_full=(-11, -20.5),
        years=(
            "1:10+55 110:15+50 160:70+12 230:75+12 285:30+50 330:12+60",
            "1:25+20 105:30+20 150:65+5 240:70+10 290:40+30 330:25+25",
        ),
    ),
    "wheat": Surface(
        code=6, c_bare=(-11.5, -19.8), c_full=(-14.6, -19.2),
        years=(
            "1:30+3 62:36+3 100:70 125:95 152:95+2 172:70+25 188:22+72 199:4+92 202:3+70 228:8+50 242:3+12 "
            "278:3+5 302:15+3 335:28+3",
            "1:22+3 68:28+3 108:60 133:93 158:94+2 178:70+25 194:20+74 206:4+90 209:4+60 226:10+30 255:55+5 "
            "285:68+3 292:10+15 310:8+5 340:18+3",
        ),
    ),
    "rapeseed": Surface(
        code=7, c_bare=(-11.8, -19.5), c_full=(-11, -14.8),
        years=(
            "1:50+8 65:52+8 92:85 104:85+0+8 112:25+0+70 128:20+0+76 138:85+0+6 165:85+8 184:35+55 194:6+85 "
            "197:4+60 225:15+30 236:3+10 252:12+5 285:60+2 325:60+4",
            "1:32+6 70:34+6 100:72 114:80+0+4 121:40+0+42 134:40+0+45 144:80+0+5 168:80+10 188:40+48 200:6+85 "
            "203:4+50 226:45+20 250:50+10 262:5+8 285:25+3 325:40+4",
        ),
    ),
    "maize": Surface(
        code=8, c_bare=(-11.2, -19.5), c_full=(-10.6, -15.8), l_full=(-12.5, -20.5),
        years=(
            "1:4+16 90:6+10 110:2+3 138:4+2 160:35 180:80 198:96 238:92+3 258:65+30 274:25+65 278:3+45 310:3+25",
            "1:50+5 80:60+5 112:70+5 118:5+15 146:4+3 168:35 188:80 206:95 240:90+4 256:70+22 260:4+35 285:15+10 "
            "320:45+5",
        ),
    ),
    "alfalfa": Surface(
        code=9, mixed="margin", c_bare=(-11.8, -19.5), c_full=(-11.2, -17.4),
        years=(
            "1:32+15 80:42+8 110:80 130:95 134:25+15 152:80 168:95 172:25+15 192:80 208:92 212:25+15 236:80 "
            "252:88 256:25+12 285:60+4 320:45+10",
            "1:10+12 80:10+10 92:3+2 125:20 150:60 178:92 182:25+15 205:80 226:92 230:25+15 265:75+3 320:45+10",
            "1:28+18 85:40+10 125:85 148:95 152:25+16 172:80 192:94 196:25+15 220:80 240:90 244:25+14 280:65+4 "
            "320:42+12",
        ),
    ),
    "garden": Surface(
        code=10, green="grass", spread=1.2, variety=2, texture=0.1, heat=4, c_bare=(-8.5, -15.5), c_full=(-8, -14.5),
        l_bare=(-9, -18), l_full=(-9, -17.5),
        years=(
            "1:40+10 120:62+3 200:55+12 300:50+10",
            "1:25+5 120:40+2 200:38+8 300:33+6",
        ),
    ),
    "yard": Surface(
        code=10, ground="asphalt", green="grass", variety=2, texture=0.12, heat=8,
        c_bare=(-7.5, -15.5), c_full=(-7.5, -15.5), l_bare=(-8, -18), l_full=(-8, -18),
        years=(
            "1:6 140:12 300:8",
        ),
    ),
    "bare": Surface(
        code=11, ground="rock", green="grass", mixed="margin", variety=1.6, texture=0.08, heat=7, c_bare=(-10.8, -19),
        l_bare=(-13.5, -23.5),
        years=(
            "1:2+3 140:7+2 300:3+3",
        ),
    ),
    "track": Surface(code=11, ground="gravel", heat=4, c_bare=(-12.5, -21)),
    "road": Surface(code=10, ground="asphalt", variety=0.8, heat=8, c_bare=(-14.5, -23)),
    "tile roof": Surface(code=10, ground="tile", variety=1.8, heat=11, c_bare=(-2.5, -10.5), l_bare=(-1.5, -12)),
    "slate roof": Surface(code=10, ground="slate", variety=1.8, heat=12, c_bare=(-2.5, -10.5), l_bare=(-1.5, -12)),
    "metal roof": Surface(code=10, ground="metal", variety=1.8, heat=9, c_bare=(-0.5, -8.5), l_bare=(0, -10.5)),
}
# fmt: on
SURFACES["margin"] = SURFACES["grassland"]
SURFACES["ley"] = SURFACES["alfalfa"]
SURFACES["needles"] = SURFACES["conifer"]
SURFACES["stream"] = SURFACES["water"]
SURFACES["tree"] = SURFACES["broadleaf"]
# fmt: off
SURFACES |= {
    "orchard": Surface(
        code=12, ground="grass floor", green="broadleaf", bloom="blossom", spread=1.2, variety=1.5, texture=0.16,
        heat=1, c_bare=(-9.8, -17), c_full=(-9, -14.8), l_bare=(-10.5, -18), l_full=(-9.5, -15.5),
        years=(
            "1:10+5 85:14+4+2 102:18+0+16 118:38+0+4 150:52 250:50 290:38+4 315:18+8 335:10+6",
            "1:8+4 95:10+4 125:34 160:46 265:42 300:26+8 325:10+6",
        ),
    ),
    "vineyard": Surface(
        code=12, ground="pale soil", green="crop", spread=1.2, variety=1.5, texture=0.13, heat=4,
        c_bare=(-10.2, -18.5), c_full=(-9.6, -15.8), l_bare=(-12, -21), l_full=(-11.5, -19),
        years=(
            "1:12+8 80:18+6 105:8+8 125:14+5 160:36+3 190:46+4 255:42+5 285:26+12 305:10+12 325:8+8",
            "1:3+4 100:4+4 130:12+2 165:30 200:38 255:36+2 290:18+12 310:5+6",
        ),
    ),
    "olive grove": Surface(
        code=12, ground="pale soil", green="evergreen", spread=1.5, variety=1.3, texture=0.2, heat=4,
        c_bare=(-10, -17.5), c_full=(-9.2, -15.4), l_bare=(-11, -19.5), l_full=(-10, -17),
        years=(
            "1:46+8 100:50+6 160:36+22 220:32+26 280:36+16 330:44+8",
            "1:30+4 120:34+4 200:28+8 300:30+4",
        ),
    ),
    "scrub": Surface(
        code=13, ground="litter", green="evergreen", mixed="margin", spread=1.3, variety=1.7, texture=0.14,
        c_bare=(-10.4, -17.5), c_full=(-9.4, -15.6), l_bare=(-11.5, -20), l_full=(-10, -17.5),
        years=(
            "1:50+12 110:60+8 150:66+6 200:48+26 250:42+32 300:48+18",
            "1:30+14 110:44+10 150:62+4 220:54+14 280:42+12+14 320:32+14",
            "1:34+36 120:46+26 170:56+16 230:50+14+10 290:38+32",
        ),
    ),
    "steppe": Surface(
        code=4, ground="pale soil", green="grass", mixed="margin", spread=1.6, variety=1.5, texture=0.07, heat=2,
        years=(
            "1:38+22 90:56+12 125:58+14 150:30+44 185:8+68 260:8+62 300:24+40",
            "1:18+44 115:34+34 160:40+34 200:20+54 270:22+46 320:18+44",
        ),
    ),
}
# fmt: on
SURFACES["motorway"] = SURFACES["road"]
KIND = {name: number for number, name in enumerate(SURFACES)}
COVERS = (
    "stream",
    "track",
    "road",
    "tile roof",
    "slate roof",
    "metal roof",
    "margin",
    "ley",
    "tree",
    "needles",
    "motorway",
)
"""Surfaces that lie over others or grow among them; each comes in `VARIANTS` hues."""
VARIANTS = 16
