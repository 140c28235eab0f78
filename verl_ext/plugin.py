"""Entry point into every verl process.

``VERL_USE_EXTERNAL_MODULES=verl_ext.plugin`` makes ``import verl`` import this module in the driver, the workers, the
reward workers and the rollout servers. verl raises what is raised here; the entry-point group ``verl.plugins`` would
only log it at DEBUG, and the run would silently go on without us, so that group is not used.

``verl`` itself is still being imported at that moment: nothing heavy may be imported here.
"""

from __future__ import annotations

import os

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from verl_ext import compat, cpu_platform

    cpu_platform.register()
    compat.patch_for_cpu()
