"""Checkpoints of other programs in timm's keys: a file for each source, and the rules by which keys are renamed.

Each source has ``is_<source>(state)`` and ``to_timm(state)``, which returns (state_dict, log, dropped): the log lists
(keys that came, key that was made), ``dropped`` lists (key that came, why it has no place). A key that the source does
not know keeps its name, so that strict loading refuses it.
"""
