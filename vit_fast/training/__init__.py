"""Training a model on images by class, on timm's and torch's parts. ``vit-fast train`` uses it; extra ``train``.

``settings``       the settings of a run, named as timm's flags
``datasets``       folders of images by class, scikit-learn's digits, the split for validation
``loading``        batches of a data set: augmentation and order that depend on seed, epoch and image alone
``models``         the model by name: weights to begin from, frozen parameters, LoRA
``parallel``       the processes of torchrun; the model as DDP or FSDP2
``optimization``   optimiser, schedule of the learning rate, autocast, loss scaling, clipping
``state``          all that a run needs to go on bit for bit, as one file
``run_folder``     the folder of a run: who may write it, its files, written whole or not at all
``loop``           epochs of training and validation
``errors``         the error that a user can fix
"""
