import os

# The models under test are tiny: more threads than one only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
