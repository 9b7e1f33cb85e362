"""Interpreted kernels that call other @triton.jit functions, several times faster.

Triton's interpreter replaces the functions of triton.language anew at every such call, which takes a millisecond and
changes nothing: the launch has replaced them already. Only triton.language.core, which Triton's own functions use and a
launch leaves alone, needs it, once.
"""

import triton.language as tl
from triton.runtime import interpreter


def patch_nested_calls():
    """Replace InterpretedFunction.__call__ for the rest of the process."""

    def call(self, *args, **kwargs):
        function = self.rewrite()
        if tl.core.is_builtin(tl.core.full):
            interpreter._patch_lang(self.fn)
        return function(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
