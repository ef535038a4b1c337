"""How much CO2 a country's electricity stands for."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass

from panterra.errors import InputError

SOURCE = "Our World in Data after Ember and the Energy Institute, CC BY 4.0, in codecarbon 3.3.2"

GRID_G_PER_KWH = {
    "ABW": (561, 2022), "AFG": (133, 2022), "AGO": (175, 2022), "ALB": (24, 2022), "ARE": (561, 2022),
    "ARG": (354, 2023), "ARM": (265, 2022), "ASM": (611, 2022), "ATG": (611, 2022), "AUS": (549, 2023),
    "AUT": (111, 2023), "AZE": (671, 2022), "BDI": (250, 2022), "BEL": (138, 2023), "BEN": (584, 2022),
    "BFA": (468, 2022), "BGD": (691, 2023), "BGR": (335, 2023), "BHR": (905, 2022), "BHS": (660, 2022),
    "BIH": (600, 2023), "BLR": (442, 2022), "BLZ": (226, 2022), "BMU": (651, 2022), "BOL": (532, 2023),
    "BRA": (98, 2023), "BRB": (606, 2022), "BRN": (894, 2022), "BTN": (23, 2022), "BWA": (848, 2022),
    "CAN": (170, 2023), "CHE": (35, 2023), "CHL": (291, 2023), "CHN": (582, 2023), "CIV": (394, 2022),
    "CMR": (305, 2022), "COD": (24, 2022), "COG": (700, 2022), "COK": (250, 2022), "COL": (260, 2023),
    "COM": (643, 2022), "CPV": (558, 2022), "CRI": (53, 2023), "CUB": (638, 2022), "CYM": (643, 2022),
    "CYP": (534, 2023), "CZE": (450, 2023), "DEU": (381, 2023), "DJI": (692, 2022), "DMA": (529, 2022),
    "DNK": (152, 2023), "DOM": (581, 2022), "DZA": (635, 2022), "ECU": (150, 2023), "EGY": (570, 2023),
    "ERI": (632, 2022), "ESP": (174, 2023), "EST": (417, 2023), "ETH": (25, 2022), "FIN": (79, 2023),
    "FJI": (288, 2022), "FLK": (500, 2022), "FRA": (56, 2023), "FRO": (405, 2022), "GAB": (492, 2022),
    "GBR": (238, 2023), "GEO": (168, 2023), "GHA": (484, 2022), "GIB": (600, 2022), "GIN": (237, 2022),
    "GLP": (500, 2021), "GMB": (667, 2022), "GNB": (625, 2022), "GNQ": (592, 2022), "GRC": (337, 2023),
    "GRD": (640, 2022), "GRL": (179, 2022), "GTM": (328, 2022), "GUF": (218, 2021), "GUM": (623, 2022),
    "GUY": (640, 2022), "HKG": (699, 2022), "HND": (282, 2022), "HRV": (205, 2023), "HTI": (567, 2022),
    "HUN": (204, 2023), "IDN": (676, 2022), "IND": (713, 2023), "IRL": (291, 2023), "IRN": (655, 2023),
    "IRQ": (689, 2022), "ISL": (28, 2022), "ISR": (583, 2022), "ITA": (331, 2023), "JAM": (556, 2022),
    "JOR": (541, 2022), "JPN": (485, 2023), "KAZ": (821, 2023), "KEN": (70, 2023), "KGZ": (147, 2022),
    "KHM": (418, 2022), "KIR": (667, 2022), "KNA": (636, 2022), "KOR": (431, 2023), "KWT": (649, 2023),
    "LAO": (266, 2022), "LBN": (599, 2022), "LBR": (228, 2022), "LBY": (819, 2022), "LCA": (667, 2022),
    "LKA": (510, 2022), "LSO": (20, 2022), "LTU": (160, 2023), "LUX": (105, 2023), "LVA": (123, 2023),
    "MAC": (449, 2022), "MAR": (630, 2023), "MDA": (643, 2023), "MDG": (436, 2022), "MDV": (612, 2022),
    "MEX": (507, 2023), "MKD": (565, 2023), "MLI": (408, 2022), "MLT": (459, 2023), "MMR": (399, 2023),
    "MNE": (417, 2023), "MNG": (775, 2023), "MOZ": (136, 2022), "MRT": (465, 2022), "MSR": (1000, 2022),
    "MTQ": (523, 2021), "MUS": (632, 2022), "MWI": (67, 2022), "MYS": (606, 2022), "NAM": (59, 2022),
    "NCL": (661, 2022), "NER": (671, 2022), "NGA": (523, 2023), "NIC": (265, 2022), "NLD": (268, 2023),
    "NOR": (30, 2023), "NPL": (24, 2022), "NRU": (750, 2022), "NZL": (113, 2023), "OMN": (565, 2023),
    "PAK": (441, 2023), "PAN": (162, 2022), "PER": (266, 2023), "PHL": (611, 2023), "PNG": (507, 2022),
    "POL": (662, 2023), "PRI": (679, 2022), "PRK": (390, 2022), "PRT": (166, 2023), "PRY": (24, 2023),
    "PSE": (516, 2022), "PYF": (443, 2022), "QAT": (602, 2023), "REU": (573, 2021), "ROU": (241, 2023),
    "RUS": (441, 2023), "RWA": (316, 2022), "SAU": (707, 2022), "SDN": (263, 2022), "SEN": (512, 2022),
    "SGP": (471, 2023), "SHN": (1000, 2022), "SLB": (700, 2022), "SLE": (50, 2022), "SLV": (271, 2023),
    "SOM": (579, 2022), "SPM": (600, 2022), "SRB": (636, 2023), "SSD": (629, 2022), "STP": (643, 2022),
    "SUR": (349, 2022), "SVK": (117, 2023), "SVN": (231, 2023), "SWE": (41, 2023), "SWZ": (172, 2022),
    "SYC": (565, 2022), "SYR": (702, 2022), "TCA": (654, 2022), "TCD": (629, 2022), "TGO": (443, 2022),
    "THA": (550, 2023), "TJK": (117, 2022), "TKM": (1306, 2022), "TLS": (667, 2022), "TON": (625, 2022),
    "TTO": (682, 2022), "TUN": (564, 2023), "TUR": (465, 2023), "TWN": (642, 2023), "TZA": (339, 2022),
    "UGA": (45, 2022), "UKR": (260, 2022), "URY": (129, 2023), "USA": (369, 2023), "UZB": (1168, 2022),
    "VCT": (529, 2022), "VEN": (186, 2022), "VGB": (647, 2022), "VIR": (632, 2022), "VNM": (475, 2023),
    "VUT": (571, 2022), "WSM": (474, 2022), "YEM": (566, 2022), "ZAF": (708, 2023), "ZMB": (112, 2022),
    "ZWE": (298, 2022),
}  # fmt: skip
"""Grams of CO2 equivalent per kWh of a country's mean electricity (ISO 3166 alpha-3), and the year; see `SOURCE`, file
`global_energy_mix.json`. Left out: the Central African Republic, whose figure is rounded to 0, and Western Sahara, with
a figure of 2009."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The electricity that a job ran on."""

    grams_per_kwh: float
    """Of CO2 equivalents."""
    source: str
    country: str | None = None
    year: int | None = None


def local_grid(country: str | None = None, grams_per_kwh: float | None = None) -> Grid | None:
    """Choose the electricity of a job: a given intensity, a given country, or what the environment says of either.

    The environment's words are PANTERRA_GRAMS_PER_KWH and PANTERRA_COUNTRY. None where nothing is known.
    """
    if grams_per_kwh is None and country is None:
        grams_per_kwh, country = number_of("PANTERRA_GRAMS_PER_KWH"), os.environ.get("PANTERRA_COUNTRY") or None
    if grams_per_kwh is not None:
        return Grid(grams_per_kwh=grams_per_kwh, source="given", country=country)
    if country is None:
        return None
    if country not in GRID_G_PER_KWH:
        near = difflib.get_close_matches(country.upper(), GRID_G_PER_KWH, n=3)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise InputError(
            f"no grid intensity known for country {country!r}; wanted one of {len(GRID_G_PER_KWH)} ISO 3166 codes such "
            f"as FRA, KEN or USA{meant}, or the environment variable PANTERRA_GRAMS_PER_KWH"
        )
    grams, year = GRID_G_PER_KWH[country]
    return Grid(grams_per_kwh=grams, source=f"{country} {year}, {SOURCE}", country=country, year=year)


def number_of(variable: str, *, least: float = 0.0) -> float | None:
    """Read a number from the environment; None where it is not set."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise InputError(f"the environment variable {variable} is {text!r}; wanted a number of {least:g} or more")
    return value
