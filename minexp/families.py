"""Names of the background families: which serve for training, which are held out, and what each is drawn from."""

TRAINING = ("mean", "uniform", "gaussian", "flat", "phase")
DEFAULT, *_random = TRAINING
RANDOM = tuple(_random)  # the mean colour is one picture: two draws of it are the same
HELD_OUT = ("blur", "shuffled", "texture")
OTHER = "other"  # whole other images: they bring rival evidence, so they are reported apart
FROM_REFERENCE = ("phase", "shuffled", OTHER)  # drawn from other images of the data
FROM_IMAGE = ("blur",)  # drawn from the explained image itself
POOL = 16  # different draws of a family and purpose, unless more are asked for
