"""The kernels, one backend each; ``fastattn.dispatch`` chooses among them."""

from os import getpid

#: The process that imported fastattn; one forked from it is another.
PROCESS = getpid()
