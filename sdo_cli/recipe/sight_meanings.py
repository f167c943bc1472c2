"""What the keys of ``combine`` and ``sight`` mean (see :mod:`.meanings`)."""

from sdo_cli.recipe.meaning import Meaning

COMBINE_MEANINGS = {
    "normalise": Meaning(
        "What each reward is divided by before its weight.",
        "combine: {normalise: spread}",
        "`none`: nothing; a PickScore of 21 and a CLIP score of 0.3 then need weights a hundred times apart. `spread`:"
        " how far its scores lie apart in training, a running figure (a step keeps 95 %), so weights compare."
        " `spread-at-start`: how far those of 64 pictures lie apart before the first step, and kept. A reward that"
        " pictures begin to lose spreads further, and the running figure lets go of it just then. For either, pictures"
        " of the first steps are drawn once more to begin with. Checkpoints keep it; `metrics.jsonl` has it under"
        " `spreads`.",
    ),
    "conflict": Meaning(
        "What is done where rewards pull a picture in opposite directions.",
        "rewards: [clip, aesthetic]\ncombine: {conflict: projection}",
        "`none`: their gradients are added. `projection`: what of each goes against another is taken off before"
        " (PCGrad). `mgda`: the shortest vector between them, along which none gets worse, times their number; short"
        " gradients count most there, so weights mean less. Both are taken picture by picture, at the decoded picture,"
        " and decode once.",
    ),
    "measure": Meaning(
        "Whether each reward's gradient is looked at.",
        "rewards: [clip, aesthetic]\ncombine: {measure: true}",
        "Lengths and cosines at the pictures, weighted, stand in `metrics.jsonl` under `gradients`. With `conflict`"
        " they are there anyway.",
    ),
}

SIGHT_MEANINGS = {
    "views": Meaning(
        "Altered copies of each picture that a reward scores.",
        "sight: {views: 4, crop: 0.2}",
        "The score is their mean. The rewards' time and memory grow as often; the decoder's do not.",
    ),
    "crop": Meaning(
        "The largest share of each side that is cut off.",
        "sight: {crop: 0.2}",
        "Drawn anew for every view and step; what is left is made as large as the picture was.",
    ),
    "noise": Meaning(
        "The strength of noise that is added.",
        "sight: {noise: 0.02}",
        "A standard deviation, of pixels from 0 to 1.",
    ),
    "jpeg": Meaning(
        "The lowest quality of JPEG that the picture goes through.",
        "sight: {jpeg: 60}",
        "Drawn between this and 95; 0: none. Colours are not subsampled. Gradients pass its rounding as if there were"
        " none.",
    ),
    "lower_bound": Meaning(
        "How much of the views' spread is taken off their mean.",
        "sight: {views: 4, crop: 0.2, lower_bound: 1.0}",
        "A picture that is liked in one crop only is then worth less. Needs two views or more.",
    ),
    "sharpness": Meaning(
        "How far the picture is moved against the rewards before their gradient is taken.",
        "sight: {sharpness: 0.02}",
        "By root mean square, of pixels from 0 to 1 (SAM, at the picture): what a small change undoes is not followed."
        " Rewards are asked twice. The scores in `metrics.jsonl` are those of the moved pictures.",
    ),
}
