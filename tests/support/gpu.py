"""What tests on a GPU skip for."""

NO_FLOAT8 = "the GPU has no float8"
