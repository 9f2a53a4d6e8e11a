"""Takes a third off the time of Triton's interpreter, in which the Triton suites run.

To find NumPy's name of a type, which every operation does, it makes a table of all types.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _look_up, _known = interpreter._get_np_dtype, {}

    def _get_np_dtype(type_):
        key = type(type_), type_.name
        if key not in _known:
            _known[key] = _look_up(type_)
        return _known[key]

    interpreter._get_np_dtype = _get_np_dtype
