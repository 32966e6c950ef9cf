"""torchvision registers shapes of operators that its compiled part declares, and fails where that part cannot be loaded.

InternVL's preprocessing uses none of them, so the registrations are left out: the module that makes them is there already,
and empty, when torchvision asks for it.
"""

import sys
import types

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
