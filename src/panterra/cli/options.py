"""What several commands take."""

from typing import Annotated

from cyclopts import Parameter

INCOMPLETE = 3
"""Exit status where an output is complete but for some tiles."""

Json = Annotated[bool, Parameter(name="--json", show_default=False, help="Print the result as JSON and nothing else.")]
SceneAddress = Annotated[str, Parameter(help="A scene: a folder with scene.json, or the address of an ItemCollection.")]
ModelName = Annotated[str, Parameter(name="--model", help="A name (see: panterra models), or a folder.")]
RandomSeed = Annotated[
    int | None,
    Parameter(name="--random", help="Draw the weights from this seed instead of loading them: trials and baselines."),
]
ModalityNames = Annotated[list[str], Parameter(consume_multiple=True, help="Which modalities to show the model.")]
PatchM = Annotated[float, Parameter(help="Side of a patch in metres: the pixel of the result.")]
WindowPx = Annotated[int, Parameter(help="Side of what the model sees at once, in pixels of the common grid.")]
OverlapPx = Annotated[int, Parameter(help="How far windows overlap; features are blended there.")]
TilePx = Annotated[int, Parameter(help="Side of a unit of work: bounds memory; the result does not depend on it.")]
On = Annotated[str, Parameter(help="Where tiles are computed: local, processes:N, ray, or ray://HOST:10001.")]
Device = Annotated[str, Parameter(help="Where the model computes: cpu, cuda, cuda:N, or auto: a GPU if there is one.")]
CrsCode = Annotated[str, Parameter(help="Projected CRS of the result; by default the UTM zone with most of the area.")]
Aoi = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,  # west of Greenwich
        help="Vector file, or west,south,east,north in degrees: nothing outside is read or mapped.",
    ),
]
Before = Annotated[
    str, Parameter(help="For a model of change: the periods to compare, where not those it was trained on.")
]
After = Annotated[str, Parameter(help="The later one, such as 2024 or 2024-05/2024-09.")]
Overwrite = Annotated[bool, Parameter(show_default=False, help="Replace what is there.")]
Country = Annotated[str, Parameter(help="ISO 3166 code, such as FRA: turns electricity into CO2 equivalents.")]
BudgetKwh = Annotated[float, Parameter(help="Stop before or between tiles where the job takes more electricity.")]
LabelColumn = Annotated[str, Parameter(help="Column with the class or value, where its name does not say it.")]
BlockM = Annotated[float, Parameter(help="Side of the spatial blocks that keep neighbours in one part.")]
