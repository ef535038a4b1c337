"""The sensors and maps that models look at: bands, their order, what a pixel value means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["series", "still", "weather", "constant"]
"""series: varies in space and time; still: a map; weather: varies in time alone; constant: one value per sample."""

Unit = Literal["reflectance_1e4", "dn", "db", "metres", "code", "percent", "fraction", "degrees", "physical", "index"]
"""reflectance_1e4: surface or top-of-atmosphere reflectance times 10,000, without any offset.
dn: the digital numbers as the agency delivers them. db: 10 log10 of linear backscatter. code: a class code.
physical: each band in its own SI unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """One channel of a modality."""

    name: str
    gsd: float
    """Ground sampling distance in metres, as delivered."""
    wavelength: float | None = None
    """Centre in micrometres; None for radar and maps."""
    common: str | None = None
    """STAC common name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """What a modality's pixels are, in band order. A new modality is a row in `MODALITIES`, nothing else."""

    name: str
    title: str
    bands: tuple[Band, ...]
    unit: Unit
    gsd: float = 10.0
    """Pixel size of this modality in a `Batch` whose common grid is 10 m."""
    kind: Kind = "series"
    nodata: float | None = None
    """The value that usually marks missing pixels in files."""
    plausible: tuple[float, float] | None = None
    """Nearly all values of real scenes lie between these two, in the declared unit."""

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)

    @property
    def categorical(self) -> bool:
        """True where values must never be averaged."""
        return self.unit == "code"


def _s2(*names: str) -> tuple[Band, ...]:
    """Pick Sentinel-2 MSI bands by name (ESA, S2 MSI spectral responses, mean of 2A and 2B)."""
    table = {
        "B01": (60, 0.443, "coastal"),
        "B02": (10, 0.492, "blue"),
        "B03": (10, 0.560, "green"),
        "B04": (10, 0.665, "red"),
        "B05": (20, 0.704, "rededge071"),
        "B06": (20, 0.740, "rededge075"),
        "B07": (20, 0.783, "rededge078"),
        "B08": (10, 0.833, "nir"),
        "B8A": (20, 0.865, "nir08"),
        "B09": (60, 0.945, "nir09"),
        "B10": (60, 1.374, "cirrus"),
        "B11": (20, 1.614, "swir16"),
        "B12": (20, 2.202, "swir22"),
    }
    return tuple(Band(name=n, gsd=table[n][0], wavelength=table[n][1], common=table[n][2]) for n in names)


def _landsat8(*names: str) -> tuple[Band, ...]:
    """Pick Landsat 8/9 OLI and TIRS bands by number (USGS)."""
    table = {
        "B1": (30, 0.443, "coastal"),
        "B2": (30, 0.482, "blue"),
        "B3": (30, 0.561, "green"),
        "B4": (30, 0.655, "red"),
        "B5": (30, 0.865, "nir08"),
        "B6": (30, 1.609, "swir16"),
        "B7": (30, 2.201, "swir22"),
        "B8": (15, 0.590, "pan"),
        "B9": (30, 1.373, "cirrus"),
        "B10": (100, 10.895, "lwir11"),
        "B11": (100, 12.005, "lwir12"),
    }
    return tuple(Band(name=n, gsd=table[n][0], wavelength=table[n][1], common=table[n][2]) for n in names)


def _plain(gsd: float, *names: str) -> tuple[Band, ...]:
    return tuple(Band(name=name, gsd=gsd) for name in names)


def _colour(gsd: float, *, infrared: str | None = None) -> tuple[Band, ...]:
    """Red, green, blue and, where named, near infrared of airborne and commercial cameras."""
    bands = (
        Band(name="R", gsd=gsd, wavelength=0.65, common="red"),
        Band(name="G", gsd=gsd, wavelength=0.56, common="green"),
        Band(name="B", gsd=gsd, wavelength=0.48, common="blue"),
    )
    return bands if infrared is None else (*bands, Band(name=infrared, gsd=gsd, wavelength=0.83, common="nir"))


OSM_CATEGORIES = (
    "aerialway_pylon",
    "aerodrome",
    "airstrip",
    "amenity_fuel",
    "building",
    "chimney",
    "communications_tower",
    "crane",
    "flagpole",
    "fountain",
    "generator_wind",
    "helipad",
    "highway",
    "leisure",
    "lighthouse",
    "obelisk",
    "observatory",
    "parking",
    "petroleum_well",
    "power_plant",
    "power_substation",
    "power_tower",
    "river",
    "runway",
    "satellite_dish",
    "silo",
    "storage_tank",
    "taxiway",
    "water_tower",
    "works",
)

WORLDCEREAL_PRODUCTS = tuple(
    f"{product}-classification"
    for product in (
        "tc-annual-temporarycrops",
        "tc-maize-main-irrigation",
        "tc-maize-main-maize",
        "tc-maize-second-irrigation",
        "tc-maize-second-maize",
        "tc-springcereals-springcereals",
        "tc-wintercereals-irrigation",
        "tc-wintercereals-wintercereals",
    )
)

WORLDCOVER_CODES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)

ERA5_BANDS = (
    "2m-temperature",
    "2m-dewpoint-temperature",
    "surface-pressure",
    "10m-u-component-of-wind",
    "10m-v-component-of-wind",
    "total-precipitation",
)

ERA5_LAND_BANDS = ("d2m", "e", "pev", "ro", "sp", "ssr", "ssrd", "str", "swvl1", "swvl2", "t2m", "tp", "u10", "v10")

_S2_L2A = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09"]
_LANDSAT = ["B8", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11"]

# Bands stand in the order in which the published models store them (OlmoEarth: storage order; AnySat: input contract).
MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality(
            name="sentinel2_l2a",
            title="Sentinel-2 surface reflectance",
            bands=_s2(*_S2_L2A),
            unit="reflectance_1e4",
            nodata=0,
            plausible=(0, 12000),
        ),
        Modality(
            name="sentinel2",
            title="Sentinel-2 top-of-atmosphere reflectance (L1C)",
            bands=_s2(*_S2_L2A, "B10"),
            unit="reflectance_1e4",
            nodata=0,
            plausible=(0, 12000),
        ),
        Modality(
            name="sentinel1",
            title="Sentinel-1 backscatter",
            bands=_plain(10, "vv", "vh"),
            unit="db",
            nodata=-32768,
            plausible=(-40, 10),
        ),
        Modality(
            name="sentinel1_ascending",
            title="Sentinel-1 backscatter of ascending orbits",
            bands=_plain(10, "vv", "vh"),
            unit="db",
            nodata=-32768,
            plausible=(-40, 10),
        ),
        Modality(
            name="landsat",
            title="Landsat 8/9 level 1",
            bands=_landsat8(*_LANDSAT),
            unit="dn",
            nodata=0,
            plausible=(1000, 60000),
        ),
        Modality(
            name="landsat7",
            title="Landsat 7 ETM+",
            bands=tuple(
                Band(name=name, gsd=30, wavelength=wavelength, common=common)
                for name, wavelength, common in (
                    ("B1", 0.485, "blue"),
                    ("B2", 0.560, "green"),
                    ("B3", 0.660, "red"),
                    ("B4", 0.835, "nir08"),
                    ("B5", 1.650, "swir16"),
                    ("B7", 2.220, "swir22"),
                )
            ),
            unit="dn",
            gsd=30,
            nodata=0,
            plausible=(1, 255),
        ),
        Modality(
            name="hls",
            title="Harmonized Landsat Sentinel-2",
            bands=_landsat8("B2", "B3", "B4", "B5", "B6", "B7"),
            unit="reflectance_1e4",
            gsd=30,
            nodata=-9999,
            plausible=(0, 12000),
        ),
        Modality(
            name="modis",
            title="MODIS surface reflectance",
            bands=tuple(
                Band(name=f"B{i}", gsd=250 if i < 3 else 500, wavelength=wavelength)
                for i, wavelength in enumerate((0.645, 0.859, 0.469, 0.555, 1.240, 1.640, 2.130), start=1)
            ),
            unit="reflectance_1e4",
            gsd=250,
            nodata=-28672,
            plausible=(0, 12000),
        ),
        Modality(
            name="alos2",
            title="ALOS-2 PALSAR-2 backscatter",
            bands=_plain(25, "hh", "hv"),
            unit="db",
            gsd=30,
            nodata=0,
            plausible=(-45, 10),
        ),
        Modality(
            name="aerial",
            title="Aerial imagery with infrared",
            bands=_colour(0.2, infrared="NIR"),
            unit="dn",
            gsd=0.2,
            kind="still",
            plausible=(0, 255),
        ),
        Modality(
            name="aerial_flair",
            title="Aerial imagery with infrared and height (FLAIR)",
            bands=(*_colour(0.2, infrared="NIR"), Band(name="elevation", gsd=0.2)),
            unit="dn",
            gsd=0.2,
            kind="still",
            plausible=(0, 255),
        ),
        Modality(
            name="spot",
            title="SPOT 6/7 pansharpened",
            bands=_colour(1.0),
            unit="dn",
            gsd=1.0,
            kind="still",
            plausible=(0, 255),
        ),
        Modality(
            name="planet",
            title="Planet monthly mosaics",
            bands=_colour(3.0),
            unit="dn",
            gsd=3.0,
            kind="still",
            plausible=(0, 255),
        ),
        Modality(
            name="naip",
            title="NAIP at 0.625 m",
            bands=_colour(0.625, infrared="IR"),
            unit="dn",
            gsd=0.625,
            kind="still",
            plausible=(0, 255),
        ),
        Modality(
            name="naip_10",
            title="NAIP at 2.5 m",
            bands=_colour(0.625, infrared="IR"),
            unit="dn",
            gsd=2.5,
            kind="still",
            plausible=(0, 255),
        ),
        Modality(
            name="worldcover",
            title="ESA WorldCover",
            bands=_plain(10, "B1"),
            unit="code",
            kind="still",
            nodata=0,
        ),
        Modality(
            name="worldcover_onehot",
            title="ESA WorldCover, one channel per class",
            bands=_plain(10, *(f"class_{code}" for code in WORLDCOVER_CODES)),
            unit="fraction",
            kind="still",
            plausible=(0, 1),
        ),
        Modality(
            name="srtm",
            title="SRTM elevation",
            bands=_plain(30, "srtm"),
            unit="metres",
            kind="still",
            nodata=-32768,
            plausible=(-430, 8850),
        ),
        Modality(
            name="openstreetmap_raster",
            title="OpenStreetMap features",
            bands=_plain(2.5, *OSM_CATEGORIES),
            unit="fraction",
            kind="still",
            plausible=(0, 1),
        ),
        Modality(
            name="wri_canopy_height_map",
            title="Canopy height (Meta/WRI)",
            bands=_plain(1, "B1"),
            unit="metres",
            kind="still",
            nodata=255,
            plausible=(0, 80),
        ),
        Modality(
            name="cdl",
            title="USDA Cropland Data Layer",
            bands=_plain(30, "cdl"),
            unit="code",
            kind="still",
            nodata=0,
        ),
        Modality(
            name="worldcereal",
            title="WorldCereal crop products",
            bands=_plain(10, *WORLDCEREAL_PRODUCTS),
            unit="percent",
            kind="still",
            nodata=255,
            plausible=(0, 100),
        ),
        Modality(
            name="worldpop",
            title="WorldPop population count",
            bands=_plain(100, "B1"),
            unit="physical",
            kind="still",
            nodata=-99999,
        ),
        Modality(
            name="eurocrops",
            title="EuroCrops crop codes",
            bands=_plain(10, "B1"),
            unit="code",
            kind="still",
            nodata=0,
        ),
        Modality(
            name="gse",
            title="Google satellite embeddings",
            bands=_plain(10, *(f"A{i:02d}" for i in range(64))),
            unit="physical",
            kind="still",
        ),
        Modality(
            name="ndvi",
            title="Vegetation index from Sentinel-2",
            bands=_plain(10, "ndvi"),
            unit="index",
            plausible=(-1, 1),
        ),
        Modality(
            name="era5_10",
            title="ERA5 monthly weather",
            bands=_plain(31000, *ERA5_BANDS),
            unit="physical",
            gsd=2560,
            kind="weather",
        ),
        Modality(
            name="era5l_day_10",
            title="ERA5-Land daily weather",
            bands=_plain(9000, *ERA5_LAND_BANDS),
            unit="physical",
            gsd=2560,
            kind="weather",
        ),
        Modality(
            name="latlon",
            title="Latitude and longitude",
            bands=_plain(0, "lat", "lon"),
            unit="degrees",
            kind="constant",
            plausible=(-180, 180),
        ),
    )
}
