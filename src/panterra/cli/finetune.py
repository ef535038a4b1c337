"""`panterra finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from panterra.cli.options import BlockM, Country, Json, LabelColumn, ModalityNames, ModelName, Overwrite, RandomSeed
from panterra.errors import InputError


def finetune(
    *scenes: Annotated[str, Parameter(help="Scenes that the labels lie on, one or several.")],
    model: ModelName,
    out: Annotated[Path, Parameter(help="Folder of the fine-tuned model.")],
    labels: Annotated[
        Path | None, Parameter(help="Points or polygons with a class or value column, or a raster of them.")
    ] = None,
    dataset: Annotated[str | None, Parameter(help="A labelled data set instead of scenes, by name.")] = None,
    root: Annotated[Path | None, Parameter(help="Where the data set lies.")] = None,
    limit: Annotated[int | None, Parameter(help="Samples of each split of the data set, at most.")] = None,
    random: RandomSeed = None,
    column: LabelColumn | None = None,
    task: Annotated[
        Literal["classification", "multilabel", "segmentation", "regression", "scene_regression", "detection"] | None,
        Parameter(help="Classes become a segmentation and values a regression, unless told otherwise."),
    ] = None,
    before: Annotated[
        str | None, Parameter(help="Labels tell what changed: from this period, such as 2020 or 2020-05/2020-09.")
    ] = None,
    after: Annotated[
        str | None, Parameter(help="To this one. Or the columns that hold both periods of each label.")
    ] = None,
    size_m: Annotated[
        float | None, Parameter(help="Detection: side of the boxes around labels that are points.")
    ] = None,
    area: Annotated[
        Path | None, Parameter(help="Detection: polygons in which every object is labelled, where the scenes are not.")
    ] = None,
    modalities: ModalityNames | None = None,
    method: Annotated[
        Literal["full", "head", "lora"], Parameter(help="All weights, the head alone, or the head and LoRA.")
    ] = "full",
    head: Annotated[
        Literal["linear", "mlp", "attention", "conv"],
        Parameter(help="linear, mlp: of patches; conv: a decoder to pixels; attention: one answer per sample."),
    ] = "linear",
    skip: Annotated[
        bool, Parameter(show_default=False, help="Show the decoder the pixels of the finest modality too.")
    ] = False,
    patch_m: Annotated[float, Parameter(help="Side of the encoder's patches in metres.")] = 40,
    sub_patches: Annotated[
        bool,
        Parameter(
            show_default=False, help="Let the head look at sub-patches, for models that have them, such as AnySat."
        ),
    ] = False,
    output_m: Annotated[
        float | None,
        Parameter(help="Side of the map's pixels; with conv those of the imagery, else the patches or sub-patches."),
    ] = None,
    window_px: Annotated[int | None, Parameter(help="Side of a sample in pixels; 64, or the data set's own.")] = None,
    block_m: BlockM = 1000,
    epochs: Annotated[int, Parameter(help="Rounds through the training samples, at most.")] = 50,
    head_first: Annotated[int, Parameter(help="Epochs in which the head learns alone.")] = 5,
    patience: Annotated[int, Parameter(help="Epochs without a better validation figure before it stops.")] = 10,
    batch_size: Annotated[int, Parameter(help="Samples per step.")] = 8,
    lr: Annotated[float, Parameter(help="Peak learning rate of the head.")] = 1e-3,
    encoder_lr: Annotated[
        float | None, Parameter(help="Peak in the encoder's last layer; 1e-4, or 1e-3 with LoRA, if left out.")
    ] = None,
    layer_decay: Annotated[float, Parameter(help="Learning rate of a layer by that of the one above.")] = 0.75,
    rank: Annotated[int, Parameter(help="Rank of LoRA's changes.")] = 8,
    class_weights: Annotated[
        Literal["none", "balanced"], Parameter(help="balanced: rare classes count as much as common ones.")
    ] = "none",
    loss: Annotated[
        Literal["cross_entropy", "dice"], Parameter(help="Of a segmentation; dice: both, for classes that are small.")
    ] = "cross_entropy",
    label_smoothing: Annotated[float, Parameter(help="Share of each label spread over all classes.")] = 0.0,
    augment: Annotated[bool, Parameter(negative="--no-augment", help="Flip, turn, leave out dates, add noise.")] = True,
    precision: Annotated[
        Literal["float32", "bfloat16"], Parameter(help="bfloat16: faster on GPUs and some processors.")
    ] = "float32",
    seed: int = 42,
    device: Annotated[str, Parameter(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")] = "auto",
    overwrite: Overwrite = False,
    country: Country | None = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on labels and scenes, or on a data set; a stopped run goes on where it was."""
    from panterra.commands.finetune import finetune_dataset, finetune_scenes
    from panterra.commands.terminal import show_json, show_table
    from panterra.finetune.augment import NONE, Augmentation
    from panterra.finetune.run import Settings
    from panterra.finetune.step import Tuning

    settings = Settings(
        head=head,
        skip=skip,
        patch_m=patch_m,
        sub_patches=sub_patches,
        tuning=Tuning(
            method=method,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            encoder_lr=encoder_lr,
            layer_decay=layer_decay,
            head_first=head_first,
            patience=patience,
            rank=rank,
            alpha=2.0 * rank,
            class_weights=class_weights,
            loss=loss,
            label_smoothing=label_smoothing,
            augmentation=Augmentation() if augment else NONE,
            precision=precision,
            seed=seed,
        ),
        device=device,
        country=country,
        overwrite=overwrite,
    )
    if (dataset is None) != (root is None):
        raise InputError("a data set needs the folder where it lies: give both --dataset and --root")
    if dataset is not None and root is not None:
        if any((scenes, labels, column, task, before, after, size_m, area, output_m)):
            raise InputError("a data set has its own imagery, labels and task; leave out scenes and their options")
        result = finetune_dataset(
            dataset,
            root,
            out,
            model=model,
            random=random,
            modalities=modalities,
            window_px=window_px,
            limit=limit,
            settings=settings,
        )
    elif not scenes or labels is None:
        raise InputError("fine-tuning needs a scene and --labels, or --dataset and --root; give either")
    else:
        result = finetune_scenes(
            scenes,
            labels,
            out,
            model=model,
            random=random,
            column=column,
            task=task,
            before=before,
            after=after,
            size_m=size_m,
            area=area,
            modalities=modalities,
            output_m=output_m,
            window_px=window_px or 64,
            block_m=block_m,
            settings=settings,
        )
    if as_json:
        show_json({"model": str(result.folder), **result.model.summary})
        return
    figures = result.test.metrics.items()
    rows = [(n, f"{i.estimate:.3f}", f"{i.low:.3f} to {i.high:.3f}" if i.low == i.low else "-") for n, i in figures]
    show_table(["", "held out", "95 % interval"], rows)
    if result.test.classes:
        columns = ("support", "precision", "recall", "f1", "iou")
        print()
        show_table(
            ["class", *columns],
            [(name, *(f"{f[c]:.3g}" for c in columns)) for name, f in result.test.classes.items()],
        )
    folder = result.folder
    use = f"map with: panterra map SCENE --probe {folder} --out map.tif"
    if result.model.task == "boxes":
        use = f"find objects with: panterra detect SCENE --model {folder} --out objects.geojson"
    print(
        f"\n{result.folder}: epoch {result.best_epoch} of {result.epochs}, {result.seconds:.0f} s,"
        f" {result.kwh * 1000:.3g} Wh; {use}"
    )
    if terms := result.model.setup.base.terms:
        print(terms)
