"""Halves the time of Triton's interpreter, in which the Triton suites run.

To find NumPy's name of a type, which every operation does, it makes a table of all types; to patch
what is built in, which every launch does, it looks at everything that modules have; and of every
tensor's shape, a tuple, it makes the name of a type that nobody reads.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from inspect import getmembers

    from triton.language import core
    from triton.runtime import interpreter

    _look_up, _known = interpreter._get_np_dtype, {}
    _built_in = {}

    def _get_np_dtype(type_):
        key = type(type_), type_.name
        if key not in _known:
            _known[key] = _look_up(type_)
        return _known[key]

    def _patch_builtin(package, builder, *scope):
        if package not in _built_in:
            members = getmembers(package)
            _built_in[package] = [name for name, member in members if core.is_builtin(member)]
        for name in _built_in[package]:
            member = getattr(package, name)
            if core.is_builtin(member):  # not patched already
                interpreter._patch_attr(package, name, member, builder, *scope)

    def _init(self, types, fields=None):
        self.types = types
        self.fields = fields or [""] * len(types)

    def _name(self):
        pairs = zip(self.fields, self.types, strict=True)
        return "[" + ",".join(f"{field}:{type_}" for field, type_ in pairs) + "]"

    interpreter._get_np_dtype = _get_np_dtype
    interpreter._patch_builtin = _patch_builtin
    core.tuple_type.__init__, core.tuple_type.name = _init, property(_name)
