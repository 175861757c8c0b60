"""Python imports this module when it starts, if its folder is on PYTHONPATH: then every process finds GPUs in software.

SOFTWARE_GPUS is their number. Commands that start other Python processes, such as `python -m bench.gpu`, run as they
would on a machine with GPUs.
"""

import os

if "SOFTWARE_GPUS" in os.environ:
    from software_cuda import SoftwareCuda

    forever = SoftwareCuda(int(os.environ["SOFTWARE_GPUS"])).active()  # a name keeps it from being collected
    forever.__enter__()
