"""Times launch configurations on this GPU: those that the shipped rules pick, similar ones, and the libraries.

    python -P benchmarks/tune --out FILE.json [--seconds 240 --only linear,attention --models base --batches 1,256]

A problem is one kernel at one shape of a ViT, in bfloat16 (``problems``). Its candidates are the config that the rule
of kernels/configs.py picks there, and neighbours of it that fit the chip (``candidates``). Processes without a GPU
compile them ahead, in the order of the timing, into Triton's cache (``compilers``). A candidate must first keep the
error budget against float64 (vit_fast.parity); for one that fails to launch, or is wrong, the reason is recorded. Times
are medians of event-timed steps with a cold L2 cache, queued while the device pauses, so that they contain no host time
(``timing``); the best config, the rule's config and the libraries are then timed once more, together (``ranking``). On
sm_90 the linear problems have the configs of kernels/linear_hopper.py beside those of kernels/linear.py, and everywhere
the kernels by CUTLASS that `vit-fast build --cutlass` has built (one with a LayerNorm folded in is timed with the pass
that computes the statistics of the rows, which it needs). Both can hang, because their warps wait for each other: a
separate process checks and times them, and is ended when an answer is late (``guarded``).
The most telling shapes come first and the file is written after each (``report``), so that the budget may end anywhere.
Winners are put into kernels/configs.py by hand, with machine, date and commit.

--candidates few takes the most telling neighbours alone, --candidates hopper those of linear_hopper.
--dry-run lists problems and candidates, --compile-only compiles them for --arch; both work without a GPU (``command``).
"""
