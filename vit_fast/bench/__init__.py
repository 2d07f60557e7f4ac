"""Measuring vit_fast against other libraries and against the device's limits. ``vit-fast`` and benchmarks/ use it.

It needs the packages of the extra ``bench`` and imports nothing of the command line. The files:

``providers``      our variants and the baselines by name
``settings``       the checked settings of a benchmark
``models``         making a model of vit_fast or timm by name
``weights``        kinds of weights without trained ones
``baselines``      the same network by timm, torch.compile, torchvision and transformers
``engines``        and by OpenVINO and ONNX Runtime, in floating point and int8
``calibration``    the images that static quantisation is calibrated on
``scaled_mm``      the float8 baseline, in plain PyTorch
``families``       the model families against their plain PyTorch form
``photographs``    photographs as input
``contest``        the models with the same weights, and their pixels
``time_budget``    which parts of a benchmark fit into a time limit, and deadlines
``compare``        parity first, then timing: a row for each provider and batch size
``training``       the same for training: forward+backward, and the step of an optimiser
``training_step``  what is timed there
``rounds``         timing in rounds, and the figures of a row
``speedup``        the statistics of every verdict
``measure``        how time, memory and FLOPs are taken
``peak_rss``       peak resident memory of a provider in a process of its own
``recorders``      recording which operators a call runs
``operations``     the operations of a forward pass, their FLOPs and bytes
``backward_operations``  the same of a training step
``attribution``    a profiler's trace, by operation
``profile``        the time of each operation of a forward pass beside its roofline bound
``predict``        what a forward pass would take on a GPU that is not here, by a model
``launches``       what it would launch, from shapes alone
``resources``      registers and shared memory of a launch
``instruction_model``  the time of a launch by a model of instructions
``gpus``           published facts of GPUs
``machine``        facts about this machine
``results``        files of rows, and their plot
``errors``         errors that the user can fix
"""
